//! Tokens per second of a server for one client and for many: `cargo run --release --example serve_load -- HOST:PORT
//! [CLIENTS] [TOKENS] [BODY]`.
//!
//! One client sends requests one after the other; then CLIENTS (200) clients send one each at the same time. Every
//! request generates TOKENS (64) tokens after a prompt of its own; BODY is a JSON object of further fields, such as
//! `{"dlf": {"method": "large"}}`. The first round is not counted.
#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What all requests have in common.
struct Load {
    address: String,
    tokens: usize,
    fields: serde_json::Map<String, Value>,
}

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("usage: serve_load HOST:PORT [CLIENTS] [TOKENS] [BODY]")?;
    let clients = arguments.next().map_or(Ok(200), |clients| clients.parse())?;
    let tokens = arguments.next().map_or(Ok(64), |tokens| tokens.parse())?;
    let fields = arguments.next().map_or(Ok(serde_json::Map::new()), |body| serde_json::from_str(&body))?;
    let load = Load { address, tokens, fields };
    load.request(0)?;

    let started = Instant::now();
    let alone = (0..clients.min(20)).map(|index| load.request(index)).sum::<Outcome<usize>>()?;
    let alone = alone as f64 / started.elapsed().as_secs_f64();
    println!("1 client: {alone:.0} tokens/s");

    let started = Instant::now();
    let together = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..clients)
            .map(|index| {
                scope.spawn({
                    let load = &load;
                    move || load.request(index)
                })
            })
            .collect();
        let join = |client: std::thread::ScopedJoinHandle<'_, Outcome<usize>>| {
            client.join().unwrap_or_else(|_| Err("a client panicked".into()))
        };
        clients.into_iter().map(join).sum::<Outcome<usize>>()
    })?;
    let together = together as f64 / started.elapsed().as_secs_f64();
    println!("{clients} clients: {together:.0} tokens/s, {:.2} times as many", together / alone);
    Ok(())
}

impl Load {
    /// Sends one request and returns the tokens it generated.
    fn request(&self, index: usize) -> Outcome<usize> {
        let prompt = format!("Question: Tom has {index} apples and buys {} more.", index * 7 % 50);
        let mut body = json!({
            "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": true,
        });
        for (name, value) in &self.fields {
            body[name] = value.clone();
        }
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address)?;
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        if !head.starts_with("HTTP/1.1 200") {
            return Err(answer.into());
        }
        let answer: Value = serde_json::from_str(body)?;
        let tokens = answer["usage"]["completion_tokens"].as_u64().ok_or("no usage")?;
        Ok(tokens as usize)
    }
}
