//! From keyword arguments to a rule.

use engine::FusionRule;
use engine::fusion::{AlphaGrid, DynamicRule, Objective, PerExpert, SearchMode};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// How logits are combined, as it was asked for.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options {
    method: String,
    alpha: Option<Vec<f64>>,
    grid: Option<(f64, f64, f64)>,
    search: String,
    objective: String,
    every: usize,
}

impl Options {
    /// The rule, which an ensemble has yet to check.
    pub(crate) fn rule(&self) -> PyResult<FusionRule> {
        if self.alpha.is_some() != (self.method == "static") {
            return wrong("alpha", "a value for method=\"static\", and none for others", &self.method);
        }
        Ok(match self.method.as_str() {
            "large" => FusionRule::Large,
            "small" => FusionRule::Small,
            "expert" => FusionRule::Expert(0),
            "static" => FusionRule::Static(self.per_expert()?),
            "dynamic" => FusionRule::Dynamic(self.dynamic()?),
            other => match other.strip_prefix("expert:").and_then(|t| t.parse().ok()) {
                Some(t) => FusionRule::Expert(t),
                None => return wrong("method", "dynamic, static, large, small, expert or expert:N", other),
            },
        })
    }

    fn per_expert(&self) -> PyResult<PerExpert<f64>> {
        let alpha = self.alpha.as_deref().unwrap_or_default();
        PerExpert::try_from(alpha).or_else(|_| wrong("alpha", "at most 8 values", &alpha.len().to_string()))
    }

    fn dynamic(&self) -> PyResult<DynamicRule> {
        let mut rule = DynamicRule { every: self.every, ..DynamicRule::default() };
        if let Some((start, stop, step)) = self.grid {
            let grid = AlphaGrid::new(start, stop, step, false).map_err(crate::error)?;
            rule.grids = std::iter::once(grid).collect();
        }
        rule.mode = match self.search.as_str() {
            "grid" => SearchMode::Grid,
            "refine" => SearchMode::Refine,
            other => return wrong("search", "grid or refine", other),
        };
        rule.objective = match self.objective.as_str() {
            "both" => Objective::Both,
            "forward" => Objective::Forward,
            "reverse" => Objective::Reverse,
            other => return wrong("objective", "both, forward or reverse", other),
        };
        Ok(rule)
    }
}

fn wrong<T>(what: &str, expected: &str, found: &str) -> PyResult<T> {
    Err(PyValueError::new_err(format!("{what}: expected {expected}, found {found:?}")))
}
