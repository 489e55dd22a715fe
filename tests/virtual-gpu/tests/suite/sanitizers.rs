//! Each sanitizer on a kernel broken on purpose, and on the same kernel mended.

use crate::common::gpu_with;
use cudarc::driver::{LaunchConfig, PushKernelArg, sys};
use virtual_gpu::host::{Kind, Report};

/// Runs `body` with 64 threads in each of `blocks` blocks over 64 words in and out a block; `%i` and `%o` point to
/// the thread's words, `%t` is the thread, `%s` its offset in shared memory, `%v` its word.
fn findings(body: &str, blocks: u32, initialised: bool) -> (Vec<Report>, Option<sys::CUresult>) {
    let ptx = String::from(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry broken(.param .u64 in, .param .u64 out) {\n\
         .shared .align 16 .b8 tile[512];\n\
         .reg .b64 %i, %o, %x, %l, %b; .reg .b32 %t, %s, %v, %w, %n, %c; .reg .pred %p, %q;\n\
         ld.param.u64 %i, [in]; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; \
         mad.lo.s32 %n, %c, 64, %t; mul.wide.u32 %x, %n, 4; add.s64 %i, %i, %x; mov.b64 %b, %o; \
         add.s64 %o, %o, %x; shl.b32 %s, %t, 2; mov.u32 %v, %t; setp.lt.u32 %p, %t, 16; setp.eq.u32 %q, %t, 0;\n\
         .loc 1 77 3\n",
    ) + body
        + "\nret;\n}\n.file 1 \"broken.cu\"\n";
    let t = gpu_with("a100", &ptx);
    let n = 64 * blocks as usize;
    let input = if initialised {
        t.stream.alloc_zeros::<u32>(n).unwrap()
    } else {
        unsafe { t.stream.alloc(n) }.unwrap()
    };
    let mut output = t.stream.alloc_zeros::<u32>(n).unwrap();
    let f = t.kernel("broken");
    let mut b = t.stream.launch_builder(&f);
    b.arg(&input).arg(&mut output);
    let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
    unsafe { b.launch(config) }.unwrap();
    let outcome = t.stream.synchronize().err().map(|e| e.0);
    (t.gpu.reports(), outcome)
}

/// The broken kernel has a finding of this kind, which fails it with this error; the mended one has none.
#[track_caller]
fn caught(kind: Kind, error: sys::CUresult, broken: &str, mended: &str) -> Report {
    let (reports, outcome) = findings(broken, 2, true);
    let found = reports.iter().find(|r| r.kind == kind).cloned();
    assert_eq!(outcome, Some(error));
    let (clean, outcome) = findings(mended, 2, true);
    assert!(clean.is_empty() && outcome.is_none(), "{clean:#?}");
    found.unwrap_or_else(|| panic!("{reports:#?}"))
}

use sys::CUresult::{CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_MISALIGNED_ADDRESS};

#[test]
fn parameters_may_be_read_through_a_register() {
    // An array of two addresses, each half of the threads its own: `in`, then `out`.
    let load = |last: u32| {
        format!(
            "setp.lt.u32 %q, %t, 32; selp.u32 %w, 0, {last}, %q; mov.u64 %l, in; cvt.u64.u32 %x, %w; add.s64 %l, %l, %x;\n\
             ld.param.u64 %l, [%l]; setp.eq.s64 %p, %l, %b; selp.u32 %v, 1, 0, %p;\n\
             setp.ne.u32 %q, %v, 0; setp.ge.u32 %p, %t, 32; xor.pred %q, %p, %q; @%q trap;\nst.global.u32 [%o], %v;"
        )
    };
    let r = caught(Kind::OutOfBounds, CUDA_ERROR_ILLEGAL_ADDRESS, &load(16), &load(8));
    assert_eq!(r.thread, [32, 0, 0]);
    assert!(r.message.contains("8 bytes at 16 of 16 bytes of parameters"), "{}", r.message);
    caught(Kind::Misaligned, CUDA_ERROR_MISALIGNED_ADDRESS, &load(4), &load(8));
}

#[test]
fn global_out_of_bounds_names_the_place() {
    let load = |offset: i32| format!("ld.global.u32 %v, [%i+{offset}];\nst.global.u32 [%o], %v;");
    let r = caught(Kind::OutOfBounds, CUDA_ERROR_ILLEGAL_ADDRESS, &load(4), &load(0));
    assert_eq!((r.kernel.as_str(), r.block, r.thread, r.line), ("broken", [1, 0, 0], [63, 0, 0], 9));
    assert_eq!(r.source, Some(("broken.cu".into(), 77)));
    assert!(r.message.contains("0 bytes past the end of an allocation of 512 bytes"), "{}", r.message);
    let store = |offset: i32| format!("st.global.u32 [%o+{offset}], %v;");
    let r = caught(Kind::OutOfBounds, CUDA_ERROR_ILLEGAL_ADDRESS, &store(-4), &store(0));
    assert_eq!((r.block, r.thread), ([0, 0, 0], [0, 0, 0]));
}

#[test]
fn shared_and_local_out_of_bounds() {
    let shared =
        |offset: u32| format!("mov.u32 %w, tile; add.u32 %s, %s, %w;\nst.shared.u32 [%s+{offset}], %v;");
    caught(Kind::OutOfBounds, CUDA_ERROR_ILLEGAL_ADDRESS, &shared(260), &shared(256));
    let local = |offset: u32| format!(".local .align 8 .b8 frame[16];\nst.local.u32 [frame+{offset}], %v;");
    caught(Kind::OutOfBounds, CUDA_ERROR_ILLEGAL_ADDRESS, &local(16), &local(12));
}

#[test]
fn misaligned() {
    let at = |offset: u32| format!("@%q ld.global.u16 %v, [%i+{offset}];");
    caught(Kind::Misaligned, CUDA_ERROR_MISALIGNED_ADDRESS, &at(1), &at(2));
    let vector = |p: &str| format!("@%q ld.global.v4.u32 {{%v, %w, %n, %c}}, [%i{p}];");
    caught(Kind::Misaligned, CUDA_ERROR_MISALIGNED_ADDRESS, &vector("+8"), &vector("+16"));
}

#[test]
fn uninitialised() {
    let body = "ld.global.u32 %v, [%i];\nst.global.u32 [%o], %v;";
    let (reports, outcome) = findings(body, 1, false);
    assert_eq!(reports.iter().map(|r| r.kind).collect::<Vec<Kind>>(), [Kind::Uninitialised]);
    assert_eq!(outcome, Some(CUDA_ERROR_LAUNCH_FAILED));
    assert!(findings(body, 1, true).0.is_empty());
    let shared =
        |first: &str| format!("{first} st.shared.u32 [%s], %v;\nbar.sync 0;\nld.shared.u32 %w, [%s];");
    caught(Kind::Uninitialised, CUDA_ERROR_LAUNCH_FAILED, &shared("@%p"), &shared(""));
    let local = |at: u32| {
        format!(".local .align 8 .b8 frame[16];\nst.local.u32 [frame], %v;\nld.local.u32 %w, [frame+{at}];")
    };
    caught(Kind::Uninitialised, CUDA_ERROR_LAUNCH_FAILED, &local(4), &local(0));
}

#[test]
fn shared_races() {
    // Threads read what thread t ^ 32 wrote: another warp.
    let other = |barrier: &str| {
        format!(
            "st.shared.u32 [%s], %v;\n{barrier}\nxor.b32 %w, %s, 128;\nld.shared.u32 %w, [%w];\nst.global.u32 [%o], %w;"
        )
    };
    caught(Kind::SharedRace, CUDA_ERROR_LAUNCH_FAILED, &other(""), &other("bar.sync 0;"));
    // The neighbour, in the same warp: lockstep hides the race on this device, not from the sanitizer.
    let neighbour = |barrier: &str| {
        format!(
            "st.shared.u32 [%s], %v;\n{barrier}\nxor.b32 %w, %s, 4;\nld.shared.u32 %w, [%w];\nst.global.u32 [%o], %w;"
        )
    };
    caught(Kind::SharedRace, CUDA_ERROR_LAUNCH_FAILED, &neighbour(""), &neighbour("bar.warp.sync -1;"));
    // Writing again what others still read.
    let again = |barrier: &str| {
        format!(
            "st.shared.u32 [%s], %v;\nbar.sync 0;\nxor.b32 %w, %s, 128;\nld.shared.u32 %w, [%w];\n{barrier}\nst.shared.u32 [%s], %w;"
        )
    };
    caught(Kind::SharedRace, CUDA_ERROR_LAUNCH_FAILED, &again(""), &again("bar.sync 0;"));
    // All threads write one word: a race unless they write the same.
    let one = |value: &str| format!("st.shared.u32 [tile], {value};");
    caught(Kind::SharedRace, CUDA_ERROR_LAUNCH_FAILED, &one("%v"), &one("7"));
}

#[test]
fn conflicts_between_blocks() {
    // Both blocks write word t of the output.
    let clash = |address: &str| {
        format!("mul.wide.u32 %x, %t, 4; add.s64 %l, %b, %x;\nst.global.u32 [{address}], %v;")
    };
    caught(Kind::BlockConflict, CUDA_ERROR_LAUNCH_FAILED, &clash("%l"), &clash("%o"));
    // Counting with plain loads and stores instead of atomics.
    let plain = "@%q ld.global.u32 %v, [%b];\nadd.u32 %v, %v, 1;\n@%q st.global.u32 [%b], %v;";
    caught(Kind::BlockConflict, CUDA_ERROR_LAUNCH_FAILED, plain, "@%q red.global.add.u32 [%b], 1;");
    // A ticket without the fence in front of it: the last block reads what nobody released.
    let ticket = |fence: &str| {
        format!(
            ".reg .b32 %old; add.s64 %l, %b, 256; mul.wide.u32 %x, %c, 4; \n\
             @%q st.global.u32 [%o], %v;\n{fence}\nbar.sync 0;\n\
             @!%q bra END;\natom.global.add.u32 %old, [%i+128], 1;\n{fence}\n\
             setp.ne.u32 %p, %old, 1;\n@%p bra END;\nld.global.u32 %w, [%b];\nEND:"
        )
        // Both blocks take the ticket at one address.
        .replace("[%i+128]", "[%i]")
        .replace("mul.wide.u32 %x, %c, 4;", "mul.wide.u32 %x, %c, 256; sub.s64 %i, %i, %x;")
    };
    caught(Kind::BlockConflict, CUDA_ERROR_LAUNCH_FAILED, &ticket(""), &ticket("membar.gl;"));
}

#[test]
fn divergent_barriers() {
    let body = |guard: &str| format!("{guard} bra SKIP;\nbar.sync 0;\nSKIP:");
    let (reports, _) = findings(&body("@%p"), 1, true);
    assert_eq!(reports[0].kind, Kind::DivergentBarrier, "{reports:#?}");
    // Threads that have left do not count.
    let (reports, outcome) = findings("@%p ret;\nbar.sync 0;", 1, true);
    assert!(reports.is_empty() && outcome.is_none(), "{reports:#?}");
    // One warp waits at another barrier than the other: neither can go on.
    let (reports, outcome) = findings("shr.u32 %w, %t, 5;\nbar.sync %w;", 1, true);
    assert_eq!(reports[0].kind, Kind::DivergentBarrier, "{reports:#?}");
    assert_eq!(outcome, Some(sys::CUresult::CUDA_ERROR_LAUNCH_TIMEOUT));
}

#[test]
fn shuffle_masks() {
    let whole = |guard: &str| format!("{guard} shfl.sync.bfly.b32 %w, %v, 1, 31, -1;");
    caught(Kind::ShuffleMask, CUDA_ERROR_LAUNCH_FAILED, &whole("@%p"), &whole(""));
    // A lane outside of its own mask.
    let mask = |m: &str| format!("shfl.sync.bfly.b32 %w, %v, 1, 31, {m};");
    caught(Kind::ShuffleMask, CUDA_ERROR_LAUNCH_FAILED, &mask("0xffff"), &mask("0xffffffff"));
    let half = |delta: u32| {
        format!(
            "and.b32 %n, %t, 31; setp.lt.u32 %p, %n, 16;\n@%p shfl.sync.bfly.b32 %w, %v, {delta}, 31, 0xffff;"
        )
    };
    caught(Kind::ShuffleMask, CUDA_ERROR_LAUNCH_FAILED, &half(16), &half(8));
}

#[test]
fn asynchronous_copies_used_too_early() {
    let body = |wait: &str| {
        format!(
            "cp.async.ca.shared.global [%s], [%i], 4;\ncp.async.commit_group;\n{wait}\nld.shared.u32 %w, [%s];\nst.global.u32 [%o], %w;"
        )
    };
    let (reports, _) = findings(&body(""), 1, true);
    assert!(reports.iter().any(|r| r.kind == Kind::AsyncCopy), "{reports:#?}");
    let (reports, _) = findings(&body("cp.async.wait_group 0;"), 1, true);
    assert!(reports.is_empty(), "{reports:#?}");
    // Waiting is for the thread's own copies; the neighbour's need a barrier.
    let (reports, _) = findings(&body("cp.async.wait_all;\nxor.b32 %s, %s, 128;"), 1, true);
    assert_eq!(reports.iter().map(|r| r.kind).collect::<Vec<Kind>>()[0], Kind::Uninitialised, "{reports:#?}");
}

#[test]
fn endless_loops_and_traps_end() {
    let (reports, outcome) = findings("@%q trap;", 1, true);
    assert_eq!(
        (reports[0].kind, outcome),
        (Kind::Stopped, Some(sys::CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION))
    );
}
