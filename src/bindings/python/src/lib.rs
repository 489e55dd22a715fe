//! The Python module `dlf_engine._native`: models and generation in `ensemble`, fusion of arrays in `fuse`.

mod ensemble;
mod fuse;
mod rule;
mod worker;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// What the engine says, as the exception that Python's users expect.
fn error(error: engine::Error) -> PyErr {
    let text = error.to_string();
    match error {
        engine::Error::Cuda { .. } | engine::Error::Device { .. } => PyRuntimeError::new_err(text),
        engine::Error::Io { .. } => PyOSError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<ensemble::Ensemble>()?;
    module.add_class::<ensemble::Stream>()?;
    module.add_class::<ensemble::Step>()?;
    module.add_class::<ensemble::Generation>()?;
    module.add_class::<fuse::Fused>()?;
    module.add_function(wrap_pyfunction!(fuse::fuse, module)?)
}
