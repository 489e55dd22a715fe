//! What a test does to a device: errors in place of calls, and kernels that are broken in one place.

use crate::device::Code;
use crate::driver::Call;

/// A change of one line of a kernel, made when its image is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mutation {
    /// The kernel.
    pub kernel: String,
    /// What the line holds: parts in this order, with `*` between them.
    pub find: String,
    /// Which of those lines, from 0.
    pub nth: u64,
    /// What stands there instead of the last part; nothing: the line goes.
    pub replacement: String,
}

impl Mutation {
    fn is_in(&self, line: &str) -> bool {
        let mut rest = Some(line);
        for part in self.find.split('*') {
            rest = rest.and_then(|rest| Some(rest.split_once(part)?.1));
        }
        rest.is_some()
    }

    /// The changed image; `None` where there is no such line.
    pub fn apply(&self, text: &str) -> Option<String> {
        let mut here = false;
        let mut left = self.nth;
        let mut done = false;
        let mut out = String::with_capacity(text.len());
        for line in text.lines() {
            if let Some((_, after)) = line.split_once(".entry ") {
                here = after.trim_end_matches('(').trim() == self.kernel;
            }
            let found = here && !done && self.is_in(line);
            if found && left == 0 {
                done = true;
                if !self.replacement.is_empty() {
                    let last = self.find.rsplit('*').next().unwrap_or_default();
                    out.push_str(&line.replacen(last, &self.replacement, 1));
                }
            } else {
                out.push_str(line);
            }
            left -= u64::from(found && left > 0);
            out.push('\n');
        }
        done.then_some(out)
    }
}

/// Which calls an error is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Those of a kind.
    Kind(Call),
    /// Those of a function.
    Function(String),
}

/// An error to be returned in place of a call's work.
#[derive(Debug, Clone)]
pub struct Injection {
    /// Which calls count.
    pub target: Target,
    /// Calls left until it strikes.
    pub left: u64,
    /// What it returns.
    pub code: Code,
}

impl Injection {
    /// Counts a call; whether the error strikes it.
    pub fn strikes(&mut self, name: &str, call: Call) -> bool {
        let counts = match &self.target {
            Target::Kind(Call::Any) => call != Call::Query,
            Target::Kind(kind) => *kind == call,
            Target::Function(function) => function == name,
        };
        self.left -= u64::from(counts && self.left > 0);
        counts && self.left == 0
    }
}
