//! The Jinja of task files: prompts and expressions over the fields of a sample, and nothing else in reach.

use std::collections::HashSet;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value};

/// Instructions that one rendering may take.
const FUEL: u64 = 1_000_000;

/// Templates leave every space and line end as written; a field that isn't there is an error.
#[derive(Debug)]
pub(super) struct Templates(Environment<'static>);

impl Templates {
    pub(super) fn new() -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        // So that errors know their place.
        environment.set_debug(true);
        Ok(Self(environment))
    }

    /// Adds a template under a name.
    pub(super) fn add(&mut self, name: &str, source: &str) -> Result<(), String> {
        self.0.add_template_owned(name.to_owned(), source.to_owned()).map_err(|error| describe(&error))
    }

    /// Checks that an expression can be parsed.
    pub(super) fn check(&self, expression: &str) -> Result<(), String> {
        self.0.compile_expression(expression).map(drop).map_err(|error| describe(&error))
    }

    /// What a failure returns follows the template's name in a sentence.
    pub(super) fn render(&self, name: &str, fields: &Value) -> Result<String, String> {
        let template = self.0.get_template(name).map_err(|error| format!(": {}", describe(&error)))?;
        let failed = |error| reason(&template.undeclared_variables(false), fields, template.source(), &error);
        template.render(fields).map_err(failed)
    }

    /// The value of an expression, as JSON. What a failure returns follows the expression in a sentence.
    pub(super) fn eval(&self, expression: &str, fields: &Value) -> Result<serde_json::Value, String> {
        let compiled =
            self.0.compile_expression(expression).map_err(|error| format!(": {}", describe(&error)))?;
        let undefined = || minijinja::Error::from(ErrorKind::UndefinedError);
        let value = compiled.eval(fields.clone());
        let value = value.and_then(|value| if value.is_undefined() { Err(undefined()) } else { Ok(value) });
        let failed = |error| reason(&compiled.undeclared_variables(false), fields, expression, &error);
        let value = value.map_err(failed)?;
        serde_json::to_value(&value).map_err(|error| format!(": {error}"))
    }
}

/// Why there is no result; where a sample lacks a field, which one of those that are used.
fn reason(used: &HashSet<String>, fields: &Value, source: &str, error: &minijinja::Error) -> String {
    let there: Vec<String> = fields.try_iter().into_iter().flatten().map(|name| name.to_string()).collect();
    // Of several it is the one that stands where the error is; fields that a template asks for first may be missing, too.
    let place = error.range().and_then(|range| source.get(range)).unwrap_or(source);
    let missing = used.iter().filter(|name| !there.contains(name));
    match missing.min_by_key(|name| (!place.contains(name.as_str()), name.as_str())) {
        Some(missing) if error.kind() == ErrorKind::UndefinedError => {
            format!(" uses `{missing}`, which this sample doesn't have (it has {})", there.join(", "))
        }
        _ => format!(": {}", describe(error)),
    }
}

fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
