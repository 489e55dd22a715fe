//! The Jinja of task files: prompts and expressions over the fields of a sample, and nothing else in reach.

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};

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
        Ok(Self(environment))
    }

    /// Adds a template under a name.
    pub(super) fn add(&mut self, name: &str, source: &str) -> Result<(), String> {
        self.0.add_template_owned(name.to_owned(), source.to_owned()).map_err(describe)
    }

    /// Checks that an expression can be parsed.
    pub(super) fn check(&self, expression: &str) -> Result<(), String> {
        self.0.compile_expression(expression).map(drop).map_err(describe)
    }

    pub(super) fn render(&self, name: &str, fields: &Value) -> Result<String, String> {
        self.0.get_template(name).and_then(|template| template.render(fields)).map_err(describe)
    }

    /// The value of an expression, as JSON.
    pub(super) fn eval(&self, expression: &str, fields: &Value) -> Result<serde_json::Value, String> {
        let value = self
            .0
            .compile_expression(expression)
            .and_then(|compiled| compiled.eval(fields.clone()))
            .map_err(describe)?;
        if value.is_undefined() {
            return Err("there is no such field".to_owned());
        }
        serde_json::to_value(&value).map_err(|error| error.to_string())
    }
}

fn describe(error: minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
