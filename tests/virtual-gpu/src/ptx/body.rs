//! Bodies of kernels: declarations, labels, instructions and their operands.

use super::ast::*;
use super::lexer::Token;
use super::parser::{Parsed, Parser, space_of, type_bytes};
use std::collections::HashMap;

/// Names declared between a pair of braces.
#[derive(Default)]
struct Scope {
    registers: HashMap<String, RegId>,
    families: Vec<(String, RegId, u32)>,
    labels: HashMap<String, LabelId>,
}

struct Body {
    function: Function,
    scopes: Vec<Scope>,
    source: Option<(u32, u32)>,
}

impl Parser {
    pub(super) fn body(&mut self, function: Function) -> Parsed<Function> {
        let mut body = Body { function, scopes: vec![Scope::default()], source: None };
        self.declare_labels(&mut body)?;
        while !body.scopes.is_empty() {
            self.statement(&mut body)?;
        }
        Ok(body.function)
    }

    /// Labels of the scope that starts here, so that branches forward can be resolved.
    fn declare_labels(&mut self, body: &mut Body) -> Parsed<()> {
        let mut depth = 0;
        let mut at = self.at;
        while let Some(spanned) = self.tokens.get(at) {
            match &spanned.token {
                Token::Punct('{') => depth += 1,
                Token::Punct('}') if depth == 0 => return Ok(()),
                Token::Punct('}') => depth -= 1,
                Token::Word(name) if depth == 0 => {
                    let token = |at: usize| self.tokens.get(at).map(|s| &s.token);
                    // The name of a list of targets is none of a place.
                    let list = matches!(token(at + 2), Some(Token::Dot(name)) if name == "branchtargets");
                    if token(at + 1) == Some(&Token::Punct(':')) && !list {
                        let id = body.function.labels.len() as LabelId;
                        body.function.labels.push(name.clone());
                        if let Some(scope) = body.scopes.last_mut() {
                            scope.labels.insert(name.clone(), id);
                        }
                    }
                }
                _ => {}
            }
            at += 1;
        }
        self.error("a body without its closing brace")
    }

    fn statement(&mut self, body: &mut Body) -> Parsed<()> {
        let line = self.line();
        match self.next()? {
            Token::Punct('{') => {
                body.scopes.push(Scope::default());
                self.declare_labels(body)
            }
            Token::Punct('}') => {
                body.scopes.pop();
                Ok(())
            }
            Token::Punct(';') => Ok(()),
            Token::Dot(directive) => self.body_directive(&directive, body),
            Token::Punct('@') => {
                let negated = self.accept('!');
                let name = self.word()?;
                let Some(register) = body.register(&name) else {
                    return self.error(format!("unknown register `{name}`"));
                };
                let opcode = self.word()?;
                self.instruction(body, opcode, Some((register, negated)), line)
            }
            Token::Word(name) => {
                if !self.accept(':') {
                    return self.instruction(body, name, None, line);
                }
                if self.accept_dot("branchtargets") {
                    return self.branch_targets(body, name);
                }
                match body.label(&name) {
                    Some(id) => body.function.body.push(Statement::Label(id)),
                    None => return self.error(format!("label `{name}` was not declared")),
                }
                Ok(())
            }
            other => self.error(format!("unexpected {other:?} in a body")),
        }
    }

    fn branch_targets(&mut self, body: &mut Body, name: String) -> Parsed<()> {
        let mut list = Vec::new();
        while !self.accept(';') {
            let target = self.word()?;
            match body.label(&target) {
                Some(id) => list.push(id),
                None => return self.error(format!("unknown label `{target}`")),
            }
            self.accept(',');
        }
        body.function.branch_targets.insert(name, list);
        Ok(())
    }

    fn body_directive(&mut self, directive: &str, body: &mut Body) -> Parsed<()> {
        match directive {
            "reg" => self.registers(body),
            "shared" | "local" => {
                let space = space_of(directive).unwrap_or(Space::Local);
                let variables = self.variables(space, false)?;
                body.function.variables.extend(variables);
                Ok(())
            }
            "loc" => {
                let (file, line) = (self.int()? as u32, self.int()? as u32);
                self.int()?;
                body.source = Some((file, line));
                // `, function_name label, inlined_at file line column`
                if self.accept(',') {
                    self.word()?;
                    self.word()?;
                    if self.accept('+') {
                        self.int()?;
                    }
                    self.expect(',')?;
                    self.word()?;
                    for _ in 0..3 {
                        self.int()?;
                    }
                }
                Ok(())
            }
            "pragma" => {
                self.next()?;
                self.expect(';')
            }
            other => self.error(format!("unsupported directive .{other} in a body")),
        }
    }

    fn registers(&mut self, body: &mut Body) -> Parsed<()> {
        let Token::Dot(kind) = self.next()? else { return self.error("malformed .reg") };
        let kind = match kind.as_str() {
            "pred" => RegKind::Pred,
            other => match type_bytes(other) {
                Some(8) => RegKind::Double,
                Some(bytes) if bytes <= 4 => RegKind::Word(bytes as u8 * 8),
                _ => return self.error(format!("unsupported register type .{other}")),
            },
        };
        loop {
            let name = self.word()?;
            let first = body.function.registers.len() as RegId;
            let mut count = 1;
            if self.accept('<') {
                count = self.int()? as u32;
                self.expect('>')?;
                if count > 1 << 20 {
                    return self.error("more than a million registers");
                }
                if let Some(scope) = body.scopes.last_mut() {
                    scope.families.push((name, first, count));
                }
            } else if let Some(scope) = body.scopes.last_mut() {
                scope.registers.insert(name, first);
            }
            body.function.registers.extend(std::iter::repeat_n(kind, count as usize));
            if !self.accept(',') {
                return self.expect(';');
            }
        }
    }

    fn instruction(
        &mut self,
        body: &mut Body,
        opcode: String,
        guard: Option<(RegId, bool)>,
        line: u32,
    ) -> Parsed<()> {
        let mut modifiers = Vec::new();
        while let Some(Token::Dot(m)) = self.peek() {
            modifiers.push(m.clone());
            self.at += 1;
        }
        let mut operands = Vec::new();
        while !self.accept(';') {
            let operand = self.operand(body)?;
            operands.push(operand);
            if !self.is(';') {
                self.expect(',')?;
            }
        }
        let source = body.source;
        let instruction = Instruction { guard, opcode, modifiers, operands, line, source };
        body.function.body.push(Statement::Instruction(instruction));
        Ok(())
    }

    fn operand(&mut self, body: &Body) -> Parsed<Operand> {
        let first = self.operand_part(body)?;
        if self.accept('|') {
            let second = self.operand_part(body)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn operand_part(&mut self, body: &Body) -> Parsed<Operand> {
        match self.next()? {
            Token::Int(v) => Ok(Operand::Int(v)),
            Token::F32(v) => Ok(Operand::F32(v)),
            Token::F64(v) => Ok(Operand::F64(v)),
            Token::Punct('-') => match self.next()? {
                Token::Int(v) => Ok(Operand::Int(v.wrapping_neg())),
                Token::F64(v) => Ok(Operand::F64(v ^ 1 << 63)),
                _ => self.error("expected a number after `-`"),
            },
            Token::Punct('!') => {
                let name = self.word()?;
                match body.register(&name) {
                    Some(id) => Ok(Operand::NotReg(id)),
                    None => self.error(format!("unknown register `{name}`")),
                }
            }
            Token::Punct('[') => {
                let base = self.operand_part(body)?;
                let offset = self.offset()?;
                self.expect(']')?;
                Ok(Operand::Address(Box::new(base), offset))
            }
            Token::Punct('{') => {
                let mut list = Vec::new();
                while !self.accept('}') {
                    let element = self.operand_part(body)?;
                    list.push(element);
                    self.accept(',');
                }
                Ok(Operand::Vector(list))
            }
            Token::Word(name) => self.named(body, name),
            other => {
                self.at -= 1;
                self.error(format!("unexpected operand {other:?}"))
            }
        }
    }

    fn offset(&mut self) -> Parsed<i64> {
        let mut total = 0i64;
        loop {
            if self.accept('+') || self.is('-') {
                total = total.wrapping_add(self.int()? as i64);
            } else {
                return Ok(total);
            }
        }
    }

    fn named(&mut self, body: &Body, name: String) -> Parsed<Operand> {
        if name == "_" {
            return Ok(Operand::Sink);
        }
        if let Some(id) = body.register(&name) {
            return Ok(Operand::Reg(id));
        }
        if let Some(special) = name.strip_prefix('%') {
            let mut special = special.to_string();
            if let Some(Token::Dot(component)) = self.peek() {
                special = format!("{special}.{component}");
                self.at += 1;
            }
            return Ok(Operand::Special(special));
        }
        if let Some(id) = body.label(&name) {
            return Ok(Operand::Label(id));
        }
        if name == "WARP_SZ" {
            return Ok(Operand::Int(32));
        }
        let offset = if self.is('+') { self.offset()? } else { 0 };
        Ok(Operand::Symbol(name, offset))
    }
}

impl Body {
    fn register(&self, name: &str) -> Option<RegId> {
        for scope in self.scopes.iter().rev() {
            if let Some(&id) = scope.registers.get(name) {
                return Some(id);
            }
            for (prefix, first, count) in &scope.families {
                let number = name.strip_prefix(prefix.as_str()).and_then(|digits| digits.parse::<u32>().ok());
                if let Some(n) = number.filter(|n| n < count) {
                    return Some(first + n);
                }
            }
        }
        None
    }

    fn label(&self, name: &str) -> Option<LabelId> {
        self.scopes.iter().rev().find_map(|scope| scope.labels.get(name).copied())
    }
}
