//! A client of plain HTTP/1.1 over a socket: it sends what a test says, wrong or not, and reads what comes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// As it came, lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The data of the server-sent events.
    pub(crate) fn events(&self) -> Vec<String> {
        let data = |event: &str| event.strip_prefix("data: ").map(str::to_owned);
        self.body.split("\n\n").filter_map(data).collect()
    }
}

/// Opens a connection and sends a request, whose answer ends the connection.
pub(crate) fn send(at: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server may answer, and close, before it has read all of a body.
    let _ = stream.write_all(body);
    stream
}

/// Reads an answer to its end.
pub(crate) fn receive(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Reply {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if head.contains("transfer-encoding: chunked") {
        unchunk(&bytes[end..])
    } else {
        bytes[end..].to_vec()
    };
    Reply { status, head, body: String::from_utf8(body).unwrap() }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|window| window == b"\r\n").expect("a chunk's size");
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend(&bytes[end + 2..end + 2 + size]);
        bytes = &bytes[end + 2 + size + 2..];
    }
}

pub(crate) const JSON: &str = "Content-Type: application/json\r\n";

pub(crate) fn get(at: SocketAddr, path: &str) -> Reply {
    receive(send(at, "GET", path, "", b""))
}

pub(crate) fn post(at: SocketAddr, path: &str, body: &Value) -> Reply {
    receive(send(at, "POST", path, JSON, body.to_string().as_bytes()))
}
