//! Splits PTX text into tokens. A modifier (`.f32`, `.L2::128B`) is one token with its dot.

use super::LoadError;

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Identifier, opcode or register name, without dots.
    Word(String),
    /// `.name`, kept without the dot.
    Dot(String),
    /// Integer literal; negative numbers arrive as `-` and a number.
    Int(u64),
    /// `0f…`: the bits of an f32.
    F32(u32),
    /// `0d…` or a decimal fraction: the bits of an f64.
    F64(u64),
    /// Quoted text (file names).
    Text(String),
    /// One character of punctuation.
    Punct(char),
}

/// A token and the line it starts on.
#[derive(Debug, Clone)]
pub struct Spanned {
    /// The token.
    pub token: Token,
    /// Line of the text, from 1.
    pub line: u32,
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$')
}

/// Tokens of `text`, comments dropped.
///
/// # Errors
/// On an unterminated comment or string, a malformed number, or a character that PTX does not use.
pub fn lex(text: &str) -> Result<Vec<Spanned>, LoadError> {
    let mut lexer = Lexer { bytes: text.as_bytes(), at: 0, line: 1, out: Vec::new() };
    while lexer.at < lexer.bytes.len() {
        lexer.step()?;
    }
    Ok(lexer.out)
}

struct Lexer<'a> {
    bytes: &'a [u8],
    at: usize,
    line: u32,
    out: Vec<Spanned>,
}

impl Lexer<'_> {
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    fn take_while(&mut self, accept: impl Fn(u8) -> bool) -> String {
        let start = self.at;
        while self.at < self.bytes.len() && accept(self.bytes[self.at]) {
            self.at += 1;
        }
        String::from_utf8_lossy(&self.bytes[start..self.at]).into_owned()
    }

    fn push(&mut self, token: Token) {
        self.out.push(Spanned { token, line: self.line });
    }

    fn step(&mut self) -> Result<(), LoadError> {
        let c = self.peek(0);
        match c {
            b'\n' => {
                self.line += 1;
                self.at += 1;
            }
            b' ' | b'\t' | b'\r' | 0 => self.at += 1,
            b'/' if self.peek(1) == b'/' => {
                self.take_while(|c| c != b'\n');
            }
            b'/' if self.peek(1) == b'*' => self.block_comment()?,
            b'"' => {
                self.at += 1;
                let text = self.take_while(|c| c != b'"' && c != b'\n');
                if self.peek(0) != b'"' {
                    return Err(LoadError::new(self.line, "unterminated string"));
                }
                self.at += 1;
                self.push(Token::Text(text));
            }
            b'.' => {
                self.at += 1;
                let name = self.take_while(|c| is_word(c) || c == b':');
                if name.is_empty() {
                    return Err(LoadError::new(self.line, "a lone dot"));
                }
                self.push(Token::Dot(name));
            }
            b'0'..=b'9' => self.number()?,
            b'%' if is_word(self.peek(1)) => {
                self.at += 1;
                let name = self.take_while(is_word);
                self.push(Token::Word(format!("%{name}")));
            }
            c if is_word(c) => {
                let name = self.take_while(is_word);
                self.push(Token::Word(name));
            }
            b'{' | b'}' | b'[' | b']' | b'(' | b')' | b'<' | b'>' | b',' | b';' | b':' | b'+' | b'-'
            | b'!' | b'|' | b'=' | b'@' | b'*' | b'&' | b'~' => {
                self.at += 1;
                self.push(Token::Punct(c as char));
            }
            _ => return Err(LoadError::new(self.line, format!("unexpected byte {c:#04x}"))),
        }
        Ok(())
    }

    fn block_comment(&mut self) -> Result<(), LoadError> {
        let start = self.line;
        self.at += 2;
        loop {
            if self.at >= self.bytes.len() {
                return Err(LoadError::new(start, "unterminated comment"));
            }
            if self.peek(0) == b'*' && self.peek(1) == b'/' {
                self.at += 2;
                return Ok(());
            }
            self.line += u32::from(self.peek(0) == b'\n');
            self.at += 1;
        }
    }

    fn number(&mut self) -> Result<(), LoadError> {
        let text = self.take_while(is_word);
        let bad = |line| LoadError::new(line, format!("malformed number `{text}`"));
        let radix = |digits: &str, base| u64::from_str_radix(digits.trim_end_matches(['U', 'u']), base);
        if let Some(bits) = text.strip_prefix("0f").or(text.strip_prefix("0F")) {
            let bits = u32::from_str_radix(bits, 16).map_err(|_| bad(self.line))?;
            self.push(Token::F32(bits));
        } else if let Some(bits) = text.strip_prefix("0d").or(text.strip_prefix("0D")) {
            let bits = u64::from_str_radix(bits, 16).map_err(|_| bad(self.line))?;
            self.push(Token::F64(bits));
        } else if let Some(digits) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
            let value = radix(digits, 16).map_err(|_| bad(self.line))?;
            self.push(Token::Int(value));
        } else if let Some(digits) = text.strip_prefix("0b") {
            let value = radix(digits, 2).map_err(|_| bad(self.line))?;
            self.push(Token::Int(value));
        } else if self.peek(0) == b'.'
            && self.peek(1).is_ascii_digit()
            && text.bytes().all(|c| c.is_ascii_digit())
        {
            self.at += 1;
            let fraction = self.take_while(|c| c.is_ascii_digit());
            let value: f64 = format!("{text}.{fraction}").parse().map_err(|_| bad(self.line))?;
            self.push(Token::F64(value.to_bits()));
        } else {
            let value = radix(&text, 10).map_err(|_| bad(self.line))?;
            self.push(Token::Int(value));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_numbers_and_modifiers() {
        let tokens: Vec<Token> =
            lex("@!%p1 ld.global.L2::128B.f32 %f1, [%rd2+0x10]; // x\n0f3F800000 1.5 7U")
                .unwrap()
                .into_iter()
                .map(|s| s.token)
                .collect();
        let word = |s: &str| Token::Word(s.into());
        let dot = |s: &str| Token::Dot(s.into());
        let p = Token::Punct;
        let expected = vec![
            p('@'),
            p('!'),
            word("%p1"),
            word("ld"),
            dot("global"),
            dot("L2::128B"),
            dot("f32"),
            word("%f1"),
            p(','),
            p('['),
            word("%rd2"),
            p('+'),
            Token::Int(16),
            p(']'),
            p(';'),
            Token::F32(0x3f80_0000),
            Token::F64(1.5f64.to_bits()),
            Token::Int(7),
        ];
        assert_eq!(tokens, expected);
    }

    #[test]
    fn errors_name_the_line() {
        assert_eq!(lex("\n\n`").unwrap_err().line, 3);
        assert_eq!(lex("/* a\n b").unwrap_err().line, 1);
        assert!(lex("0xZZ").is_err());
    }
}
