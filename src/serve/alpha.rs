//! The `dlf` object of a request, and the model ids that stand for methods.

use std::str::FromStr;

use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::fields::Fields;
use crate::ensemble::Ensemble;
use crate::fusion::{AlphaGrid, DynamicRule, FusionRule, MAX_EXPERTS, Objective, PerExpert, SearchMode};

/// Every field that a `dlf` object may have: a misspelt one must not pass for a setting.
const FIELDS: [&str; 7] = ["method", "alpha", "grid", "search", "objective", "every", "return_alpha"];

/// What a request asks of the fusion.
pub(super) struct Fusion {
    pub(super) rule: FusionRule,
    /// Whether the answer has α.
    pub(super) return_alpha: bool,
}

/// The rule of `method`, with the settings of `default` where it is the same method; `None` where there is no such
/// method or expert.
pub(super) fn rule_of(method: &str, default: &FusionRule, ensemble: &Ensemble) -> Option<FusionRule> {
    match method {
        _ if method == default.name() => Some(default.clone()),
        "dynamic" => Some(FusionRule::Dynamic(DynamicRule::default())),
        "static" => Some(FusionRule::Static(std::iter::once(1.0).collect())),
        "large" => Some(FusionRule::Large),
        "small" => Some(FusionRule::Small),
        "expert" => Some(FusionRule::Expert(0)),
        _ => {
            let name = method.strip_prefix("expert:")?;
            (0..ensemble.num_experts())
                .find(|&t| ensemble.expert_name(t) == Some(name))
                .map(FusionRule::Expert)
        }
    }
}

/// The methods that an ensemble can run, as model ids name them.
pub(super) fn methods(default: &FusionRule, ensemble: &Ensemble) -> Vec<String> {
    let names = ["dynamic", "static", "large", "small"].into_iter().map(str::to_owned);
    let experts = (0..ensemble.num_experts()).filter_map(|t| ensemble.expert_name(t));
    let names = names.chain(experts.map(|name| format!("expert:{name}")));
    let runs = |name: &String| {
        rule_of(name, default, ensemble).is_some_and(|rule| ensemble.check_rule(&rule).is_ok())
    };
    names.filter(runs).collect()
}

/// Reads `dlf`; what it leaves out is as in `default`.
pub(super) fn read(body: &Fields<'_>, default: &FusionRule, ensemble: &Ensemble) -> ApiResult<Fusion> {
    let Some(dlf) = body.object("dlf", "dlf.")? else {
        return Ok(Fusion { rule: default.clone(), return_alpha: false });
    };
    if let Some(unknown) = dlf.names().find(|name| !FIELDS.contains(name)) {
        let message = format!("`dlf.{unknown}`: there is no such setting; there are {}", FIELDS.join(", "));
        return Err(ApiError::invalid(message).about(&format!("dlf.{unknown}")));
    }
    let mut rule = match dlf.string("method")? {
        None => default.clone(),
        Some(method) => rule_of(method, default, ensemble).ok_or_else(|| {
            let known = methods(default, ensemble).join(", ");
            dlf.wrong("method", &known, &method.into())
        })?,
    };
    let alpha = dlf.one_or_more("alpha", "a number, or one for each expert", MAX_EXPERTS, Value::as_f64)?;
    if let Some(alpha) = alpha {
        match &mut rule {
            FusionRule::Static(fixed) => *fixed = alpha.into_iter().collect(),
            _ => return Err(only("alpha", "static")),
        }
    }
    search(&dlf, &mut rule)?;
    ensemble.check_rule(&rule).map_err(|error| ApiError::from(&error).about("dlf"))?;
    Ok(Fusion { rule, return_alpha: dlf.flag("return_alpha")? })
}

fn only(field: &str, method: &str) -> ApiError {
    let param = format!("dlf.{field}");
    let message =
        format!("`{param}` is a setting of the {method} method alone: add \"method\": \"{method}\" to `dlf`");
    ApiError::invalid(message).about(&param)
}

/// The settings of the dynamic method.
fn search(dlf: &Fields<'_>, rule: &mut FusionRule) -> ApiResult<()> {
    let FusionRule::Dynamic(rule) = rule else {
        let given = ["grid", "search", "objective", "every"].into_iter().find(|name| dlf.get(name).is_some());
        return given.map_or(Ok(()), |name| Err(only(name, "dynamic")));
    };
    const GRID: &str = "\"START:STOP:STEP[:inclusive]\" or {start, stop, step, inclusive}, of 1 to 32 candidates, \
                        or one for each expert";
    if let Some(grids) = dlf.one_or_more("grid", GRID, MAX_EXPERTS, grid)? {
        rule.grids = grids.into_iter().collect::<PerExpert<_>>();
    }
    rule.mode = match dlf.string("search")? {
        None => rule.mode,
        Some("grid") => SearchMode::Grid,
        Some("refine") => SearchMode::Refine,
        Some(other) => return Err(dlf.wrong("search", "grid or refine", &other.into())),
    };
    rule.objective = match dlf.string("objective")? {
        None => rule.objective,
        Some("both") => Objective::Both,
        Some("forward") => Objective::Forward,
        Some("reverse") => Objective::Reverse,
        Some(other) => return Err(dlf.wrong("objective", "both, forward or reverse", &other.into())),
    };
    rule.every = dlf.count("every", 1, usize::MAX)?.unwrap_or(rule.every);
    Ok(())
}

fn grid(value: &Value) -> Option<AlphaGrid> {
    if let Some(text) = value.as_str() {
        return AlphaGrid::from_str(text).ok();
    }
    let object = value.as_object()?;
    if object.keys().any(|key| !["start", "stop", "step", "inclusive"].contains(&key.as_str())) {
        return None;
    }
    let bound = |name: &str| object.get(name)?.as_f64();
    let inclusive = object.get("inclusive").map_or(Some(false), Value::as_bool)?;
    AlphaGrid::new(bound("start")?, bound("stop")?, bound("step")?, inclusive).ok()
}
