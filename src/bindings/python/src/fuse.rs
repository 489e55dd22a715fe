//! Fusion of logits that somebody else computed.

use engine::backend::cpu::{CpuFusion, available_threads};
use engine::backend::{Choice, FuseRow};
use engine::fusion::{LogitsRows, ModelLogits};
use engine::{FusionRule, SamplingParams};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods, ToPyArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::rule::Options;

/// The decisions of some rows.
#[pyclass(frozen, get_all, module = "dlf_engine")]
pub(crate) struct Fused {
    /// `(rows,)`: the tokens chosen.
    token: Py<PyArray1<u32>>,
    /// `(rows, experts)`: α of each expert.
    alpha: Py<PyArray2<f64>>,
    /// `(rows,)`: the expert that acted, -1 where none was searched for.
    expert: Py<PyArray1<i64>>,
    /// `(rows,)`: the log-probability of the token under the fused distribution.
    logprob: Py<PyArray1<f64>>,
    /// `(rows,)`: the loss at α, NaN where there is none.
    loss: Py<PyArray1<f64>>,
}

/// A matrix of logits: one row or several.
fn matrix<'a>(name: &str, array: &'a PyReadonlyArrayDyn<'_, f32>) -> PyResult<(&'a [f32], usize)> {
    let shape = array.shape();
    let width = match *shape {
        [width] | [_, width] => width,
        _ => {
            return Err(PyValueError::new_err(format!(
                "{name}: expected one or two dimensions, found {}",
                shape.len()
            )));
        }
    };
    let values = array.as_slice().map_err(|_| {
        PyValueError::new_err(format!(
            "{name}: expected a C-contiguous array (numpy.ascontiguousarray makes one)"
        ))
    })?;
    Ok((values, width))
}

/// Fuses rows; see the wrapper in `__init__.py`.
#[pyfunction]
#[pyo3(signature = (large, small, experts, options, temperature, seed, step, threads))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of Python, all given by the wrapper")]
pub(crate) fn fuse(
    py: Python<'_>,
    large: PyReadonlyArrayDyn<'_, f32>,
    small: PyReadonlyArrayDyn<'_, f32>,
    experts: Vec<PyReadonlyArrayDyn<'_, f32>>,
    options: Options,
    temperature: f32,
    seed: u64,
    step: usize,
    threads: Option<usize>,
) -> PyResult<Fused> {
    let rule = options.rule()?;
    let (of_large, width) = matrix("large", &large)?;
    let (of_small, _) = matrix("small", &small)?;
    let of_experts = experts.iter().map(|expert| matrix("experts", expert)).collect::<PyResult<Vec<_>>>()?;
    for (name, array) in
        [("small", &small)].into_iter().chain(experts.iter().map(|expert| ("experts", expert)))
    {
        if array.shape() != large.shape() {
            let message = format!(
                "{name}: expected the shape of large, {:?}, found {:?}",
                large.shape(),
                array.shape()
            );
            return Err(PyValueError::new_err(message));
        }
    }
    if of_experts.len() > engine::model::MAX_EXPERTS {
        return Err(PyValueError::new_err(format!("experts: at most {}", engine::model::MAX_EXPERTS)));
    }
    let logits = ModelLogits {
        large: Some(LogitsRows::new(of_large, width).map_err(crate::error)?),
        small: Some(LogitsRows::new(of_small, width).map_err(crate::error)?),
        experts: of_experts
            .iter()
            .map(|(values, _)| LogitsRows::new(values, width))
            .collect::<engine::Result<_>>()
            .map_err(crate::error)?,
    };
    let params = SamplingParams { temperature, seed, ..SamplingParams::default() };
    let rows = of_large.len() / width.max(1);
    let decisions =
        py.detach(|| decide(&logits, &rule, &params, (rows, step), threads)).map_err(crate::error)?;
    let num_experts = experts.len();
    let alpha: Vec<f64> = decisions
        .iter()
        .flat_map(|decision| (0..num_experts).map(|t| decision.alpha.get(t).copied().unwrap_or(0.0)))
        .collect();
    let numbers = |of: fn(&engine::fusion::Decision) -> f64| -> Py<PyArray1<f64>> {
        decisions.iter().map(of).collect::<Vec<_>>().to_pyarray(py).unbind()
    };
    Ok(Fused {
        token: decisions.iter().map(|d| d.token).collect::<Vec<_>>().to_pyarray(py).unbind(),
        alpha: alpha.to_pyarray(py).reshape([rows, num_experts])?.unbind(),
        expert: decisions
            .iter()
            .map(|d| d.expert.and_then(|t| i64::try_from(t).ok()).unwrap_or(-1))
            .collect::<Vec<_>>()
            .to_pyarray(py)
            .unbind(),
        logprob: numbers(|d| d.logprob_fused),
        loss: numbers(|d| d.loss.unwrap_or(f64::NAN)),
    })
}

fn decide(
    logits: &ModelLogits<LogitsRows<'_>>,
    rule: &FusionRule,
    params: &SamplingParams,
    (rows, step): (usize, usize),
    threads: Option<usize>,
) -> engine::Result<Vec<engine::fusion::Decision>> {
    let choice = Choice::Sample { params, history: &[], generated: 0, banned: &[] };
    let rows: Vec<FuseRow<'_>> =
        (0..rows).map(|slot| FuseRow { slot, step, rule, held: None, choice }).collect();
    let mut decisions = Vec::new();
    CpuFusion::new(threads.unwrap_or_else(available_threads))?.fuse(logits, &rows, &mut decisions)?;
    decisions.into_iter().collect()
}
