//! What stands between the two events of a measurement, on the virtual GPU.

use std::collections::BTreeSet;

use cudarc::driver::CudaEvent;
use virtual_gpu::host::{self, Call, Driver};

use super::*;
use crate::backend::cuda::CudaBackend;
use crate::backend::{BackendOptions, Device};
use crate::error::Error;

const STEPS: usize = 6;
const LIMITS: Limits = Limits { rows: 2, slots: 2, blocks: 4 };

/// Two sequences of the demo ensemble, on a virtual GPU of their own.
struct Fixture {
    device: host::Gpu,
    ensemble: Arc<Ensemble>,
    engine: Engine,
}

impl Fixture {
    fn new(eager: bool) -> Self {
        let device = Driver::load().unwrap().device("h100").unwrap();
        Self::open(device, Device::Cuda(device.ordinal()), eager)
    }

    fn open(device: host::Gpu, place: Device, eager: bool) -> Self {
        let options = BackendOptions { eager, ..BackendOptions::new(place, LIMITS) };
        let ensemble = Arc::new(Ensemble::demo().unwrap());
        let engine = Engine::open(options, &ensemble).unwrap();
        Self { device, ensemble, engine }
    }

    fn backend(&mut self) -> &mut CudaBackend {
        let Engine::Gpu(backend) = &mut self.engine else { panic!("a GPU was asked for") };
        backend
    }

    fn steps(&mut self, count: usize) {
        let ensemble = Arc::clone(&self.ensemble);
        steps(self.engine.backend(), &ensemble, &tables(2, 2), 0..count).unwrap();
    }

    /// Kernels that have run.
    fn ran(&self) -> usize {
        self.device.launches().len()
    }
}

#[test]
fn events_stand_around_the_steps_that_were_asked_for() {
    // What a step launches by itself.
    let mut one = Fixture::new(true);
    one.steps(1);
    let of_step = one.ran();
    for eager in [true, false] {
        let mut fixture = Fixture::new(eager);
        // A run before, after which a step is in flight: it isn't in the next one's time.
        for run in 0..2 {
            fixture.backend().settle().unwrap();
            fixture.device.clear();
            let before = fixture.engine.backend().launches();
            let start = fixture.backend().start().unwrap();
            assert_eq!((fixture.device.calls("cuEventRecord"), fixture.ran()), (1, 0));
            fixture.steps(STEPS);
            // Two on demand; each of the others moves the rows on and notes a time.
            let more = if eager { 0 } else { 2 };
            let asked_for = STEPS * of_step + (STEPS - 2) * more;
            assert_eq!(fixture.ran(), asked_for, "run {run}, eager {eager}");
            // The last event comes after all that, and needs nothing of the step that is in flight.
            assert_eq!(fixture.backend().seconds_since(&start).unwrap(), None);
            assert_eq!((fixture.device.calls("cuEventElapsedTime"), fixture.ran()), (1, asked_for));
            fixture.backend().settle().unwrap();
            let all = asked_for + if eager { 0 } else { of_step + more };
            let launched = (fixture.engine.backend().launches() - before) as usize;
            assert_eq!((fixture.ran(), launched), (all, all), "run {run}, eager {eager}");
        }
        assert_eq!(fixture.device.reports(), []);
    }
}

#[test]
fn of_two_gpus_the_one_that_fuses_has_the_events() {
    let [large, small] = ["h100", "a100"].map(|card| Driver::load().unwrap().device(card).unwrap());
    let place = Device::Split { large: large.ordinal(), small: small.ordinal() };
    let mut fixture = Fixture::open(large, place, false);
    // Opening it has looked for a clock.
    [large, small].iter().for_each(host::Gpu::clear);
    let start = fixture.backend().start().unwrap();
    assert_eq!((large.launches().len(), small.launches().len()), (0, 0));
    fixture.steps(2);
    // Each token needs the small model's logits, so that nothing of that GPU is left to run.
    let ran = [large, small].map(|device| device.launches().len());
    assert_eq!(ran.iter().sum::<usize>() as u64, fixture.engine.backend().launches());
    assert_eq!(fixture.backend().seconds_since(&start).unwrap(), None);
    assert_eq!([large, small].map(|device| device.launches().len()), ran);
    assert_eq!([large, small].map(|device| device.calls("cuEventElapsedTime")), [1, 0]);
}

#[test]
fn a_prompt_stands_between_them_too() {
    let mut fixture = Fixture::new(false);
    let start = fixture.backend().start().unwrap();
    let rows: Vec<Row> = (0..fixture.ensemble.models().len())
        .flat_map(|model| (0..2).map(move |position| (model, position)))
        .map(|(model, position)| Row { model, table: 0, position, token: 5, slot: None })
        .collect();
    fixture.backend().forward(&Batch { rows: &rows, tables: &tables(1, 1) }).unwrap();
    let (ran, records) = (fixture.ran(), fixture.device.calls("cuEventRecord"));
    assert_eq!(ran as u64, fixture.engine.backend().launches());
    assert_eq!(fixture.backend().seconds_since(&start).unwrap(), None);
    assert_eq!((fixture.ran(), fixture.device.calls("cuEventRecord")), (ran, records + 1));
}

/// The operations that fail when `work` meets an error in each of its calls to the driver.
fn failures(
    mut fixture: impl FnMut() -> (Fixture, Option<CudaEvent>),
    work: impl Fn(&mut CudaBackend, Option<&CudaEvent>) -> crate::Result<()>,
) -> BTreeSet<String> {
    /// CUDA_ERROR_LAUNCH_FAILED
    const FAILED: i32 = 719;
    let mut operations = BTreeSet::new();
    for call in [Call::Stream, Call::Synchronise, Call::Query] {
        for nth in 1.. {
            let (mut fixture, start) = fixture();
            fixture.device.inject(call, nth, FAILED);
            match work(fixture.backend(), start.as_ref()) {
                Ok(()) => break,
                Err(Error::Cuda { operation, .. }) => operations.insert(operation),
                Err(other) => panic!("{other:?}"),
            };
        }
    }
    operations
}

#[test]
fn errors_of_events_are_errors_of_the_gpu() {
    let before = failures(|| (Fixture::new(true), None), |backend, _| backend.start().map(drop));
    assert_eq!(Vec::from_iter(&before), ["cuEventRecord", "cuEventSynchronize"]);
    for (eager, steps, expected) in
        [(true, 1, &["cuEventElapsedTime", "cuEventRecord"][..]), (false, 2, &["cuEventElapsedTime"])]
    {
        let after = |eager| {
            let mut fixture = Fixture::new(eager);
            let start = fixture.backend().start().unwrap();
            fixture.steps(steps);
            (fixture, Some(start))
        };
        let end = |backend: &mut CudaBackend, start: Option<&CudaEvent>| {
            start.map_or(Ok(()), |start| backend.seconds_since(start).map(drop))
        };
        // A step that has another behind it has its event.
        assert_eq!(Vec::from_iter(&failures(|| after(eager), end)), expected);
    }
}
