//! Recursive descent over the tokens of a module. Anything it does not know is an error with its line.

use super::LoadError;
use super::ast::*;
use super::lexer::{Spanned, Token, lex};

/// Parses a module.
///
/// # Errors
/// Names the line of the first thing that is not understood.
pub fn parse(text: &str) -> Result<Module, LoadError> {
    let tokens = lex(text)?;
    let mut parser = Parser { tokens, at: 0, module: Module::default() };
    parser.module()?;
    Ok(parser.module)
}

pub(super) struct Parser {
    pub(super) tokens: Vec<Spanned>,
    pub(super) at: usize,
    module: Module,
}

pub(super) type Parsed<T> = Result<T, LoadError>;

impl Parser {
    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|s| &s.token)
    }

    pub(super) fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |s| s.line)
    }

    pub(super) fn error<T>(&self, message: impl Into<String>) -> Parsed<T> {
        Err(LoadError::new(self.line(), message))
    }

    pub(super) fn next(&mut self) -> Parsed<Token> {
        let Some(spanned) = self.tokens.get(self.at) else { return self.error("the text ends too early") };
        self.at += 1;
        Ok(spanned.token.clone())
    }

    pub(super) fn is(&self, c: char) -> bool {
        self.peek() == Some(&Token::Punct(c))
    }

    pub(super) fn accept(&mut self, c: char) -> bool {
        let found = self.is(c);
        self.at += usize::from(found);
        found
    }

    pub(super) fn expect(&mut self, c: char) -> Parsed<()> {
        if self.accept(c) { Ok(()) } else { self.error(format!("expected `{c}`, found {:?}", self.peek())) }
    }

    pub(super) fn accept_dot(&mut self, name: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Dot(d)) if d == name);
        self.at += usize::from(found);
        found
    }

    pub(super) fn word(&mut self) -> Parsed<String> {
        match self.next()? {
            Token::Word(w) => Ok(w),
            other => {
                self.at -= 1;
                self.error(format!("expected a name, found {other:?}"))
            }
        }
    }

    pub(super) fn int(&mut self) -> Parsed<u64> {
        let negative = self.accept('-');
        match self.next()? {
            Token::Int(v) => Ok(if negative { v.wrapping_neg() } else { v }),
            other => {
                self.at -= 1;
                self.error(format!("expected an integer, found {other:?}"))
            }
        }
    }

    fn module(&mut self) -> Parsed<()> {
        while let Some(token) = self.peek().cloned() {
            let Token::Dot(directive) = token else {
                return self.error(format!("expected a directive, found {token:?}"));
            };
            self.at += 1;
            match directive.as_str() {
                "version" => {
                    let Token::F64(bits) = self.next()? else { return self.error("malformed .version") };
                    let tenths = (f64::from_bits(bits) * 10.0).round() as u32;
                    self.module.version = (tenths / 10, tenths % 10);
                }
                "target" => self.target()?,
                "address_size" => {
                    if self.int()? != 64 {
                        return self.error("only 64-bit addresses are supported");
                    }
                }
                "file" => self.file()?,
                "visible" | "weak" => {}
                "extern" => self.external()?,
                "global" | "const" | "shared" => {
                    let space = space_of(&directive).unwrap_or(Space::Global);
                    let variables = self.variables(space, false)?;
                    self.module.variables.extend(variables);
                }
                "entry" => {
                    let kernel = self.entry()?;
                    self.module.kernels.push(kernel);
                }
                "section" => self.skip_braces()?,
                other => return self.error(format!("unsupported directive .{other} at module scope")),
            }
        }
        if self.module.target == 0 { self.error("the module has no .target") } else { Ok(()) }
    }

    fn target(&mut self) -> Parsed<()> {
        loop {
            let name = self.word()?;
            if let Some(sm) = name.strip_prefix("sm_") {
                let digits = sm.trim_end_matches(|c: char| c.is_ascii_alphabetic());
                match digits.parse() {
                    Ok(number) => self.module.target = number,
                    Err(_) => return self.error(format!("unknown target `{name}`")),
                }
            } else if name != "debug" && name != "texmode_unified" && name != "texmode_independent" {
                return self.error(format!("unknown target `{name}`"));
            }
            if !self.accept(',') {
                return Ok(());
            }
        }
    }

    fn file(&mut self) -> Parsed<()> {
        let number = self.int()? as u32;
        let Token::Text(name) = self.next()? else { return self.error("malformed .file") };
        self.module.files.insert(number, name);
        while self.accept(',') {
            self.int()?;
        }
        Ok(())
    }

    fn external(&mut self) -> Parsed<()> {
        if self.accept_dot("shared") {
            let variables = self.variables(Space::Shared, true)?;
            self.module.variables.extend(variables);
            return Ok(());
        }
        self.error("only .extern .shared is supported; other external symbols cannot be linked")
    }

    fn skip_braces(&mut self) -> Parsed<()> {
        while !self.accept('{') {
            self.next()?;
        }
        let mut depth = 1;
        while depth > 0 {
            match self.next()? {
                Token::Punct('{') => depth += 1,
                Token::Punct('}') => depth -= 1,
                _ => {}
            }
        }
        Ok(())
    }

    /// What follows a state space: `.align 4 .b8 name[16] = {…}, other;`.
    pub(super) fn variables(&mut self, space: Space, external: bool) -> Parsed<Vec<Variable>> {
        let mut align = 0;
        let mut vector = 1;
        let element = loop {
            let Token::Dot(word) = self.next()? else { return self.error("expected a type") };
            match word.as_str() {
                "align" => align = self.int()? as usize,
                "v2" => vector = 2,
                "v4" => vector = 4,
                "attribute" => return self.error("unsupported directive .attribute"),
                _ => match type_bytes(&word) {
                    Some(bytes) => break bytes,
                    None => return self.error(format!("unknown type .{word}")),
                },
            }
        };
        let mut out = Vec::new();
        loop {
            let name = self.word()?;
            let mut count = 1;
            let mut unsized_array = false;
            while self.accept('[') {
                if self.accept(']') {
                    unsized_array = true;
                } else {
                    count *= self.int()? as usize;
                    self.expect(']')?;
                }
            }
            let mut init = Vec::new();
            if self.accept('=') {
                self.initial(element, &mut init)?;
            }
            if unsized_array {
                count = init.len() / (element * vector);
            }
            let size = element * vector * count;
            if init.len() > size {
                return self.error(format!("initial value of `{name}` is longer than the variable"));
            }
            let align = align.max(element * vector);
            out.push(Variable { name, space, size, align, init, external });
            if !self.accept(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(out)
    }

    fn initial(&mut self, element: usize, out: &mut Vec<u8>) -> Parsed<()> {
        if self.accept('{') {
            while !self.accept('}') {
                self.initial(element, out)?;
                self.accept(',');
            }
            return Ok(());
        }
        let negative = self.accept('-');
        let bits = match self.next()? {
            Token::Int(v) => {
                if negative {
                    v.wrapping_neg()
                } else {
                    v
                }
            }
            Token::F32(bits) => u64::from(bits),
            Token::F64(bits) => bits,
            _ => return self.error("an initial value must be a number"),
        };
        out.extend_from_slice(&bits.to_le_bytes()[..element]);
        Ok(())
    }

    fn entry(&mut self) -> Parsed<Function> {
        let line = self.line();
        let mut function = Function { name: self.word()?, line, ..Function::default() };
        if self.accept('(') {
            while !self.accept(')') {
                self.param(&mut function)?;
                self.accept(',');
            }
        }
        while let Some(Token::Dot(directive)) = self.peek().cloned() {
            self.at += 1;
            match directive.as_str() {
                "maxntid" => function.max_threads = Some(self.extent()?),
                "reqntid" => function.required_threads = Some(self.extent()?),
                "minnctapersm" | "maxnreg" | "maxnctapersm" => {
                    self.int()?;
                }
                "pragma" => {
                    self.next()?;
                    self.accept(';');
                }
                other => return self.error(format!("unsupported kernel directive .{other}")),
            }
        }
        self.expect('{')?;
        self.body(function)
    }

    fn extent(&mut self) -> Parsed<[u32; 3]> {
        let mut out = [1; 3];
        for slot in &mut out {
            *slot = self.int()? as u32;
            if !self.accept(',') {
                break;
            }
        }
        Ok(out)
    }

    /// `.param .u64 .ptr .global .align 16 name` or `.param .align 8 .b8 name[24]`.
    fn param(&mut self, function: &mut Function) -> Parsed<()> {
        if !self.accept_dot("param") {
            return self.error("expected .param");
        }
        let (mut bytes, mut align, mut pointer) = (0, 0, false);
        while let Some(Token::Dot(word)) = self.peek().cloned() {
            self.at += 1;
            match word.as_str() {
                "align" => {
                    let value = self.int()? as usize;
                    // After .ptr it is the alignment of what is pointed to.
                    if !pointer {
                        align = value;
                    }
                }
                "ptr" => pointer = true,
                "global" | "shared" | "local" | "const" if pointer => {}
                _ => match type_bytes(&word) {
                    Some(size) => bytes = size,
                    None => return self.error(format!("unknown parameter type .{word}")),
                },
            }
        }
        let name = self.word()?;
        let mut size = bytes;
        if self.accept('[') {
            size *= self.int()? as usize;
            self.expect(']')?;
        }
        let align = align.max(bytes).max(1);
        let offset = function.param_bytes.next_multiple_of(align);
        function.params.push(Param { name, offset, size });
        function.param_bytes = offset + size;
        Ok(())
    }
}

/// Bytes of a fundamental type.
pub fn type_bytes(name: &str) -> Option<usize> {
    Some(match name {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" | "tf32" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return None,
    })
}

/// The state space that a directive or modifier names.
pub fn space_of(name: &str) -> Option<Space> {
    Some(match name {
        "global" => Space::Global,
        "const" => Space::Const,
        "shared" | "shared::cta" => Space::Shared,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => return None,
    })
}
