//! The driver as cudarc and an engine meet it: streams, events, pinned memory, graphs, limits, injected errors.

use crate::common::{FIXTURES, data, gpu, gpu_with};
use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::Ptx;
use sys::CUresult;
use virtual_gpu::host::{Call, Driver, Kind, Node};

/// `y[i] = x[i] + step`, one thread.
const STEP: &str = ".version 8.0\n.target sm_80\n.address_size 64\n\
    .visible .entry step(.param .u64 x, .param .u64 y, .param .u32 n) {\n\
    .reg .b64 %x, %y; .reg .b32 %v, %n;\n\
    ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.param.u32 %n, [n];\n\
    ld.global.u32 %v, [%x]; add.u32 %v, %v, %n; st.global.u32 [%y], %v; ret;\n}\n";

const ONE: LaunchConfig = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };

fn code<T>(result: Result<T, DriverError>) -> CUresult {
    result.err().map_or(CUresult::CUDA_SUCCESS, |e| e.0)
}

#[test]
fn a_device_is_what_its_profile_says() {
    for (profile, capability, count, memory) in
        [("a100", (8, 0), 108, 40), ("rtx4090", (8, 9), 128, 24), ("h100", (9, 0), 132, 80)]
    {
        let t = gpu(profile);
        assert_eq!(t.context.compute_capability().unwrap(), capability);
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        assert_eq!(t.context.attribute(attribute).unwrap(), count);
        assert_eq!(t.context.total_mem().unwrap(), memory << 30);
        assert!(t.context.name().unwrap().contains("NVIDIA"));
    }
}

#[test]
fn memory_runs_out_as_on_the_card_and_comes_back() {
    let small = Driver::load().unwrap().device_with_memory("a100", 1 << 20).unwrap();
    let context = CudaContext::new(small.ordinal()).unwrap();
    let stream = context.default_stream();
    let half = stream.alloc_zeros::<u8>(600 << 10).unwrap();
    assert_eq!(code(stream.alloc_zeros::<u8>(600 << 10)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(context.mem_get_info().unwrap().0, (1 << 20) - (600 << 10));
    drop(half);
    // The free is still queued: the pool waits for it before it gives up.
    let again = stream.alloc_zeros::<u8>(600 << 10).unwrap();
    assert_eq!(small.totals().alive.allocations, 1);
    assert_eq!(small.totals().peak_bytes, 600 << 10);
    drop(again);
}

#[test]
fn stale_pointers_are_found() {
    let t = gpu_with("a100", STEP);
    let f = t.kernel("step");
    let y = t.stream.alloc_zeros::<u32>(1).unwrap();
    let x = t.stream.alloc_zeros::<u32>(1).unwrap().leak();
    unsafe { cudarc::driver::result::free_async(x, t.stream.cu_stream()) }.unwrap();
    let n = 1u32;
    let mut b = t.stream.launch_builder(&f);
    b.arg(&x).arg(&y).arg(&n);
    unsafe { b.launch(ONE) }.unwrap();
    assert_eq!(code(t.stream.synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let report = &t.gpu.reports()[0];
    assert_eq!(report.kind, Kind::Freed);
    // The context is lost, as on the card, and the error's text says why.
    let error = t.stream.clone_dtoh(&y).unwrap_err();
    assert!(error.to_string().contains("use after free"), "{error}");
}

#[test]
fn copies_of_memory_never_written_are_found() {
    let t = gpu_with("a100", STEP);
    let x = unsafe { t.stream.alloc::<u32>(4) }.unwrap();
    assert_eq!(code(t.stream.clone_dtoh(&x)), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert_eq!(t.gpu.reports()[0].kind, Kind::Uninitialised);
}

#[test]
fn pageable_copies_are_taken_at_the_call_and_pinned_ones_when_they_run() {
    let t = gpu_with("a100", STEP);
    let stream = t.context.new_stream().unwrap();
    let mut pageable = vec![1u32];
    let mut x = stream.alloc_zeros::<u32>(1).unwrap();
    stream.memcpy_htod(&pageable, &mut x).unwrap();
    pageable[0] = 2;
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [1]);
    let mut pinned = unsafe { t.context.alloc_pinned::<u32>(1) }.unwrap();
    pinned.as_mut_slice().unwrap()[0] = 3;
    stream.memcpy_htod(&pinned, &mut x).unwrap();
    // Reusing the buffer before the copy has run is the bug that a real device shows now and then.
    pinned.as_mut_slice().unwrap()[0] = 4;
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [4]);
    // And reading before waiting sees old contents.
    stream.memcpy_dtoh(&x, &mut pinned).unwrap();
    pinned.as_mut_slice().unwrap()[0] = 9;
    stream.synchronize().unwrap();
    assert_eq!(pinned.as_slice().unwrap(), [4]);
}

#[test]
fn streams_are_ordered_by_events_and_by_nothing_else() {
    // Two streams: one adds 1, the other adds 10 to what the first left. Without the event some seed shows 10.
    let outcome = |seed: u64, wait: bool| {
        let t = gpu_with("a100", STEP);
        t.gpu.seed(seed);
        let (first, second) = (t.context.new_stream().unwrap(), t.context.new_stream().unwrap());
        let f = t.kernel("step");
        let x = first.alloc_zeros::<u32>(1).unwrap();
        let y = second.alloc_zeros::<u32>(1).unwrap();
        first.synchronize().unwrap();
        second.synchronize().unwrap();
        let (one, ten) = (1u32, 10u32);
        let mut b = first.launch_builder(&f);
        b.arg(&x).arg(&x).arg(&one);
        unsafe { b.launch(ONE) }.unwrap();
        if wait {
            let event = first.record_event(None).unwrap();
            second.wait(&event).unwrap();
        }
        let mut b = second.launch_builder(&f);
        b.arg(&x).arg(&y).arg(&ten);
        unsafe { b.launch(ONE) }.unwrap();
        let got = second.clone_dtoh(&y).unwrap()[0];
        first.synchronize().unwrap();
        t.clean();
        got
    };
    assert!((1..20).all(|seed| outcome(seed, true) == 11));
    assert!((1..20).any(|seed| outcome(seed, false) == 10));
}

#[test]
fn event_tracking_orders_streams_by_itself() {
    for seed in 1..10 {
        let gpu = Driver::load().unwrap().device("a100").unwrap();
        gpu.seed(seed);
        let context = CudaContext::new(gpu.ordinal()).unwrap();
        let module = context.load_module(Ptx::from_src(STEP)).unwrap();
        let f = module.load_function("step").unwrap();
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let mut x = first.alloc_zeros::<u32>(1).unwrap();
        let mut y = second.alloc_zeros::<u32>(1).unwrap();
        let n = 5u32;
        let mut b = first.launch_builder(&f);
        let copy = first.alloc_zeros::<u32>(1).unwrap();
        b.arg(&copy).arg(&mut x).arg(&n);
        unsafe { b.launch(ONE) }.unwrap();
        let mut b = second.launch_builder(&f);
        b.arg(&x).arg(&mut y).arg(&n);
        unsafe { b.launch(ONE) }.unwrap();
        assert_eq!(second.clone_dtoh(&y).unwrap(), [10]);
        assert_eq!(gpu.reports(), []);
    }
}

#[test]
fn without_tracking_a_launch_is_two_calls() {
    let t = gpu_with("a100", STEP);
    let stream = t.context.new_stream().unwrap();
    let (x, f, n) = (stream.alloc_zeros::<u32>(1).unwrap(), t.kernel("step"), 1u32);
    stream.synchronize().unwrap();
    t.gpu.clear();
    let mut b = stream.launch_builder(&f);
    b.arg(&x).arg(&x).arg(&n);
    unsafe { b.launch(ONE) }.unwrap();
    assert_eq!((t.gpu.calls(""), t.gpu.calls("cuCtxGetCurrent"), t.gpu.calls("cuLaunchKernel")), (2, 1, 1));
}

#[test]
fn a_graph_keeps_the_parameters_of_its_capture() {
    let t = gpu_with("a100", STEP);
    let stream = t.context.new_stream().unwrap();
    let (x, f) = (stream.alloc_zeros::<u32>(1).unwrap(), t.kernel("step"));
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let mut n = 3u32;
    stream.begin_capture(mode).unwrap();
    for _ in 0..2 {
        let mut b = stream.launch_builder(&f);
        b.arg(&x).arg(&x).arg(&n);
        unsafe { b.launch(ONE) }.unwrap();
        n = 100;
    }
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    n += 1;
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [0], "capture runs nothing");
    graph.upload().unwrap();
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [3 * 103]);
    assert_eq!(n, 101);
    t.clean();
    let launches = t.gpu.launches();
    assert!(launches.len() == 6 && launches.iter().all(|l| l.from_graph));
    assert_eq!(t.gpu.totals().graph_launches, 3);
}

#[test]
fn a_graph_over_two_streams_forks_and_joins() {
    for seed in 0..8 {
        let t = gpu_with("a100", STEP);
        let (main, side) = (t.context.new_stream().unwrap(), t.context.new_stream().unwrap());
        let f = t.kernel("step");
        let [x, y, z] = [0; 3].map(|_| main.alloc_zeros::<u32>(1).unwrap());
        main.synchronize().unwrap();
        let launch = |stream: &std::sync::Arc<cudarc::driver::CudaStream>, from, to, n: u32| {
            let mut b = stream.launch_builder(&f);
            b.arg(from).arg(to).arg(&n);
            unsafe { b.launch(ONE) }.unwrap();
        };
        main.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
        launch(&main, &x, &x, 1);
        side.join(&main).unwrap();
        launch(&side, &x, &y, 10);
        launch(&main, &x, &z, 100);
        main.join(&side).unwrap();
        launch(&main, &y, &x, 1000);
        let graph = main.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
        t.gpu.seed(seed);
        graph.launch().unwrap();
        let got = [&x, &y, &z].map(|s| main.clone_dtoh(s).unwrap()[0]);
        assert_eq!(got, [1011, 11, 101]);
        t.clean();
    }
}

#[test]
fn captures_refuse_what_the_driver_refuses() {
    let t = gpu_with("a100", STEP);
    let (stream, side) = (t.context.new_stream().unwrap(), t.context.new_stream().unwrap());
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    assert_eq!(
        code(t.context.default_stream().begin_capture(mode)),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    );
    let flags = sys::CUgraphInstantiate_flags(0);
    // Waiting for an event from outside.
    let outside = side.record_event(None).unwrap();
    stream.begin_capture(mode).unwrap();
    assert_eq!(code(stream.wait(&outside)), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(code(stream.end_capture(flags)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // Waiting for the stream.
    stream.begin_capture(mode).unwrap();
    assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(code(stream.end_capture(flags)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // Allocating: it would become a node, which the virtual device does not offer.
    stream.begin_capture(mode).unwrap();
    assert_eq!(code(unsafe { stream.alloc::<u32>(1) }), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(code(stream.end_capture(flags)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // A side stream that does not come back.
    let x = t.stream.alloc_zeros::<u32>(1).unwrap();
    t.stream.synchronize().unwrap();
    stream.begin_capture(mode).unwrap();
    side.join(&stream).unwrap();
    let (f, n) = (t.kernel("step"), 1u32);
    let mut b = side.launch_builder(&f);
    b.arg(&x).arg(&x).arg(&n);
    unsafe { b.launch(ONE) }.unwrap();
    assert_eq!(code(stream.end_capture(flags)), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
}

#[test]
fn launches_beyond_the_limits_are_refused() {
    let t = gpu("rtx4090");
    let f = t.kernel("histogram");
    let x = t.stream.alloc_zeros::<u8>(64).unwrap();
    let counts = t.stream.alloc_zeros::<u32>(256).unwrap();
    let n = 64i32;
    let launch = |grid, threads, shared| {
        let mut b = t.stream.launch_builder(&f);
        b.arg(&x).arg(&counts).arg(&n);
        let config = LaunchConfig { grid_dim: grid, block_dim: (threads, 1, 1), shared_mem_bytes: shared };
        code(unsafe { b.launch(config) }.map(|_| ()))
    };
    let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
    assert_eq!(launch((1, 1, 1), 1025, 1024), refused);
    assert_eq!(launch((1, 65_536, 1), 32, 1024), refused);
    assert_eq!(launch((0, 1, 1), 32, 1024), refused);
    assert_eq!(launch((1, 1, 1), 32, 64 << 10), refused, "more than 48 KiB needs the attribute");
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    assert_eq!(code(f.set_attribute(attribute, 100 << 10)), refused, "an RTX 4090 has 99 KiB");
    f.set_attribute(attribute, 64 << 10).unwrap();
    assert_eq!(launch((1, 1, 1), 32, 64 << 10), CUresult::CUDA_SUCCESS);
    assert_eq!(f.occupancy_max_active_blocks_per_multiprocessor(32, 64 << 10, None).unwrap(), 1);
    assert_eq!(f.occupancy_max_active_blocks_per_multiprocessor(256, 0, None).unwrap(), 6);
    let coop = t.kernel("grid_barrier");
    let mut b = t.stream.launch_builder(&coop);
    b.arg(&x).arg(&x).arg(&x).arg(&x).arg(&n);
    let config = LaunchConfig { grid_dim: (128 * 24 + 1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    let refused = code(unsafe { b.launch_cooperative(config) }.map(|_| ()));
    assert_eq!(refused, CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
    t.stream.synchronize().unwrap();
}

#[test]
fn images_for_other_devices_are_refused() {
    let t = gpu_with("a100", STEP);
    let load = |ptx: String| t.context.load_module(Ptx::from_src(ptx)).map(|_| ()).unwrap_err();
    let newer = load(STEP.replace("sm_80", "sm_90"));
    assert_eq!(newer.0, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(
        load(STEP.replace(".version 8.0", ".version 9.0")).0,
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    );
    let broken = load(STEP.replace("add.u32", "add.u33"));
    assert_eq!(broken.0, CUresult::CUDA_ERROR_INVALID_PTX);
    assert!(broken.to_string().contains("PTX line 7: `add.u33`"), "{broken}");
    assert!(load("\x7fELF".into()).to_string().contains("cannot run cubins"));
    assert_eq!(code(t.module.load_function("nothing")), CUresult::CUDA_ERROR_NOT_FOUND);
}

#[test]
fn errors_strike_where_they_are_injected() {
    let t = gpu("a100");
    t.gpu.inject(Call::Allocate, 2, CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32);
    assert!(t.stream.alloc_zeros::<u8>(16).is_ok());
    assert_eq!(code(t.stream.alloc_zeros::<u8>(16)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    let x = t.stream.alloc_zeros::<u8>(16).unwrap();
    t.gpu.inject(Call::Copy, 1, CUresult::CUDA_ERROR_LAUNCH_FAILED as i32);
    assert_eq!(code(t.stream.clone_dtoh(&x)), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert_eq!(t.stream.clone_dtoh(&x).unwrap(), [0; 16]);
    t.gpu.inject(Call::Module, 1, CUresult::CUDA_ERROR_INVALID_PTX as i32);
    assert_eq!(code(t.context.load_module(Ptx::from_src(FIXTURES))), CUresult::CUDA_ERROR_INVALID_PTX);
    t.gpu.inject(Call::Synchronise, 1, CUresult::CUDA_ERROR_UNKNOWN as i32);
    assert_eq!(code(t.stream.synchronize()), CUresult::CUDA_ERROR_UNKNOWN);
    t.clean();
}

#[test]
fn errors_strike_launches_and_every_call_of_a_graph() {
    let t = gpu_with("a100", STEP);
    let stream = t.context.new_stream().unwrap();
    let (x, f, n) = (stream.alloc_zeros::<u32>(1).unwrap(), t.kernel("step"), 1u32);
    let launch = || {
        let mut b = stream.launch_builder(&f);
        b.arg(&x).arg(&x).arg(&n);
        code(unsafe { b.launch(ONE) })
    };
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let flags = sys::CUgraphInstantiate_flags(0);
    let (error, fine) = (CUresult::CUDA_ERROR_ILLEGAL_STATE, CUresult::CUDA_SUCCESS);

    t.gpu.inject(Call::Launch, 1, error as i32);
    assert_eq!((launch(), launch()), (error, fine));
    t.gpu.inject(Call::Stream, 1, error as i32);
    assert_eq!(code(stream.begin_capture(mode)), error);
    // The second call of the capture is its end, which ends it all the same: the stream works afterwards.
    t.gpu.inject(Call::Stream, 2, error as i32);
    stream.begin_capture(mode).unwrap();
    assert_eq!(launch(), fine);
    assert_eq!(code(stream.end_capture(flags).map(|_| ())), error);
    t.gpu.inject(Call::Module, 1, error as i32);
    stream.begin_capture(mode).unwrap();
    assert_eq!(launch(), fine);
    assert_eq!(code(stream.end_capture(flags).map(|_| ())), error, "the instantiation fails");

    stream.begin_capture(mode).unwrap();
    assert_eq!(launch(), fine);
    let graph = stream.end_capture(flags).unwrap().unwrap();
    for call in [|g: &cudarc::driver::CudaGraph| g.upload(), |g: &cudarc::driver::CudaGraph| g.launch()] {
        t.gpu.inject(Call::Launch, 1, error as i32);
        assert_eq!(code(call(&graph)), error);
        assert_eq!(code(call(&graph)), fine);
    }
    t.gpu.inject(Call::Allocate, 1, CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32);
    let pinned = unsafe { t.context.alloc_pinned::<u32>(1) };
    assert_eq!(code(pinned.map(|_| ())), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [2], "one launch, and one of the graph");
    t.clean();
}

/// NVRTC 12.9's PTX of the same source for compute_90.
const NEWER: &str = include_str!("../fixtures/kernels_newer.ptx");

#[test]
fn a_newer_compilers_dialect_loads() {
    let t = gpu("h100");
    let kernels = |ptx: &str| {
        let names = ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry "));
        names.map(|name| name.trim_end_matches('(').to_string()).collect::<Vec<_>>()
    };
    // The version line lowered, as an image for this driver would have it.
    let module =
        t.context.load_module(Ptx::from_src(NEWER.replacen(".version 8.8", ".version 8.0", 1))).unwrap();
    assert_eq!(kernels(NEWER), kernels(FIXTURES));
    assert!(!kernels(NEWER).is_empty());
    for name in kernels(NEWER) {
        assert!(module.load_function(&name).is_ok(), "{name}");
    }
}

#[test]
fn counters_repeat_and_results_do_not_depend_on_the_order_of_blocks() {
    let run = |seed: u64| {
        let t = gpu("a100");
        t.gpu.seed(seed);
        let x = data(30, 3 * 512);
        let dx = t.stream.clone_htod(&x).unwrap();
        let mut p = t.stream.alloc_zeros::<f32>(x.len()).unwrap();
        let mut best = t.stream.alloc_zeros::<i32>(3).unwrap();
        let (f, n) = (t.kernel("softmax_argmax"), 512i32);
        let mut b = t.stream.launch_builder(&f);
        b.arg(&dx).arg(&mut p).arg(&mut best).arg(&n);
        let config = LaunchConfig { grid_dim: (3, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        unsafe { b.launch(config) }.unwrap();
        let p = t.stream.clone_dtoh(&p).unwrap();
        t.clean();
        (p, t.gpu.launches()[0].counters)
    };
    let first = run(0);
    assert_eq!(first, run(0));
    for seed in 1..5 {
        assert_eq!(first, run(seed));
    }
}

#[test]
fn events_wait_and_have_no_time() {
    let t = gpu_with("a100", STEP);
    let stream = t.context.new_stream().unwrap();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(flags).unwrap();
    let end = stream.record_event(flags).unwrap();
    assert_eq!(start.elapsed_ms(&end).unwrap(), 0.0);
    assert!(end.is_complete());
}

#[test]
fn what_is_left_is_counted() {
    let t = gpu_with("a100", STEP);
    let before = t.gpu.totals().alive;
    assert_eq!((before.contexts, before.modules, before.streams), (1, 1, 0));
    let stream = t.context.new_stream().unwrap();
    let (x, f, n) = (stream.alloc_zeros::<u32>(1).unwrap(), t.kernel("step"), 1u32);
    let pinned = unsafe { t.context.alloc_pinned::<u64>(5) }.unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    assert_eq!(t.gpu.totals().alive.captures, 1);
    let mut b = stream.launch_builder(&f);
    b.arg(&x).arg(&x).arg(&n);
    unsafe { b.launch(ONE) }.unwrap();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    let found = t.gpu.totals().alive;
    // The pinned memory has an event of its own.
    assert_eq!((found.streams, found.events, found.allocations, found.pinned_bytes), (1, 1, 1, 40));
    assert_eq!((found.captures, found.graphs, found.executables), (0, 1, 1));
    assert_eq!(t.gpu.graphs(), [vec![Node { work: "step".into(), after: vec![] }]]);
    drop(x);
    assert_eq!(t.gpu.totals().freed_under_graphs, 1, "the graph may use it");
    drop(graph);
    drop(pinned);
    assert_eq!(t.gpu.totals().freed_under_graphs, 1);
    drop(stream);
    assert_eq!(t.gpu.totals().alive, before);
}

#[test]
fn an_error_strikes_the_function_it_is_meant_for() {
    let t = gpu_with("a100", STEP);
    let error = CUresult::CUDA_ERROR_UNKNOWN;
    t.gpu.clear();
    t.gpu.inject_into("cuMemGetInfo_v2", 2, error as i32);
    t.stream.synchronize().unwrap();
    t.context.mem_get_info().unwrap();
    assert_eq!(t.gpu.struck(), [""; 0]);
    assert_eq!(code(t.context.mem_get_info()), error);
    t.context.mem_get_info().unwrap();
    assert_eq!(t.gpu.struck(), ["cuMemGetInfo_v2"]);
    assert_eq!(t.gpu.called()["cuMemGetInfo_v2"], 3);
}

#[test]
fn a_launch_that_is_waited_for_has_its_own_error() {
    let trap = STEP.replace("st.global.u32 [%y], %v;", "trap;");
    for blocking in [false, true] {
        let t = gpu_with("a100", &trap);
        t.gpu.blocking(blocking);
        let (x, f, n) = (t.stream.alloc_zeros::<u32>(1).unwrap(), t.kernel("step"), 1u32);
        let mut b = t.stream.launch_builder(&f);
        b.arg(&x).arg(&x).arg(&n);
        let launched = code(unsafe { b.launch(ONE) });
        let waited = code(t.stream.synchronize());
        let (fine, trapped) = (CUresult::CUDA_SUCCESS, CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION);
        assert_eq!((launched, waited), (if blocking { trapped } else { fine }, trapped));
    }
}

#[test]
fn loads_are_counted_where_they_are_watched() {
    let t = gpu_with("a100", STEP);
    let (x, f, n) = (t.stream.alloc_zeros::<u32>(20).unwrap(), t.kernel("step"), 1u32);
    let mut y = t.stream.alloc_zeros::<u32>(1).unwrap();
    t.stream.synchronize().unwrap();
    let [(base, bytes), _] = t.gpu.allocations()[..] else { panic!("{:?}", t.gpu.allocations()) };
    assert_eq!(bytes, 80);
    assert_eq!(t.gpu.loads(base), [0; 0]);
    t.gpu.watch(base);
    for first in [0, 0, 9] {
        let from = x.slice(first..);
        let mut b = t.stream.launch_builder(&f);
        b.arg(&from).arg(&mut y).arg(&n);
        unsafe { b.launch(ONE) }.unwrap();
    }
    t.stream.synchronize().unwrap();
    // A word of the first sector twice, one of the second; the last is room for an end inside a sector.
    assert_eq!(t.gpu.loads(base), [8, 4, 0, 0]);
    t.clean();
}
