//! The backend that is measured, and its clock.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;

#[cfg(feature = "cuda")]
use crate::backend::cuda::CudaBackend;
use crate::backend::{Backend, BackendOptions};
use crate::ensemble::Ensemble;

/// A backend, by what it is timed.
pub(super) enum Engine {
    /// The host's clock.
    Host(Box<dyn Backend>),
    /// Events.
    #[cfg(feature = "cuda")]
    Gpu(Box<CudaBackend>),
}

impl Engine {
    /// Opens the backend for an ensemble.
    ///
    /// # Errors
    /// Those of [`BackendOptions::open`].
    pub(super) fn open(options: BackendOptions, ensemble: &Arc<Ensemble>) -> Result<Self> {
        let ensemble = Arc::clone(ensemble);
        #[cfg(feature = "cuda")]
        if let Some(gpus) = options.device.gpus() {
            let backend = CudaBackend::new(ensemble, options.cuda(gpus), &mut |_| {})?;
            return Ok(Self::Gpu(Box::new(backend)));
        }
        Ok(Self::Host(options.open(ensemble)?))
    }

    /// What computes.
    pub(super) fn backend(&mut self) -> &mut dyn Backend {
        match self {
            Self::Host(backend) => &mut **backend,
            #[cfg(feature = "cuda")]
            Self::Gpu(backend) => &mut **backend,
        }
    }

    /// Waits until nothing is computed any more.
    ///
    /// # Errors
    /// Where the device fails.
    pub(super) fn settle(&mut self) -> Result<()> {
        match self {
            Self::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Gpu(backend) => Ok(backend.settle()?),
        }
    }

    /// Seconds from before the first launch of `work` to the end of the last that it asked for; `None` on a device
    /// without a clock. The backend must have settled.
    ///
    /// # Errors
    /// Those of `work`, and where the device fails.
    pub(super) fn time(
        &mut self,
        work: &mut dyn FnMut(&mut dyn Backend) -> Result<()>,
    ) -> Result<Option<f64>> {
        match self {
            Self::Host(backend) => {
                let start = Instant::now();
                work(&mut **backend)?;
                Ok(Some(start.elapsed().as_secs_f64()))
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(backend) => {
                let start = backend.start()?;
                work(&mut **backend)?;
                Ok(backend.seconds_since(&start)?)
            }
        }
    }
}
