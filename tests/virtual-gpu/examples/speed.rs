//! How fast the interpreter runs on this CPU: lane instructions a second, best of many runs. This says nothing about
//! any GPU. Arguments choose kernels by a part of their name.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use virtual_gpu::exec::{Accumulate, Settings, Shape, launch};
use virtual_gpu::memory::{Memory, State};
use virtual_gpu::sanitizer::Options;

type Error = Box<dyn std::error::Error>;

/// A kernel and how it is launched. Its parameters are addresses of `BIG`, `SMALL` and `OUT`, and numbers.
struct Case {
    name: &'static str,
    text: String,
    grid: [u32; 3],
    threads: u32,
    params: &'static [Param],
}

enum Param {
    Address(usize),
    Number(u32),
}

use Param::{Address, Number};

const BIG: usize = 0;
const SMALL: usize = 1;
const OUT: usize = 2;
/// Bytes of each.
const SIZES: [usize; 3] = [4 << 20, 1 << 16, 4 << 20];

fn cases() -> Vec<Case> {
    let fixtures = include_str!("../tests/fixtures/kernels.ptx");
    let made = |name, body: String| Case {
        name,
        text: format!("{HEAD}.visible .entry {name}(.param .u64 x, .param .u64 y) {{\n{OPEN}{body}{CLOSE}"),
        grid: [16, 1, 1],
        threads: 256,
        params: &[Address(BIG), Address(OUT)],
    };
    let fixture =
        |name, grid, threads, params| Case { name, text: fixtures.to_string(), grid, threads, params };
    vec![
        made("fma", looped(32, |n| format!("fma.rn.f32 %f{0}, %f{0}, %f8, %f{0};\n", n % 8))),
        made("stream", stream()),
        made("shared", looped(8, shared)),
        made("shuffle", looped(8, shuffle)),
        made("mma", looped(8, mma)),
        fixture("gemv_bf16", [128, 1, 1], 128, {
            &[Address(BIG), Address(SMALL), Address(OUT), Number(512), Number(4096)]
        }),
        fixture("softmax_argmax", [16, 1, 1], 256, {
            &[Address(BIG), Address(OUT), Address(SMALL), Number(32_000)]
        }),
        fixture("gemm_bf16", [4, 4, 1], 128, {
            &[Address(BIG), Address(BIG), Address(OUT), Number(256), Number(256), Number(512)]
        }),
    ]
}

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";
/// Registers, eight sums, and the thread's place in the grid: `%t`, and %x and %y 16 bytes a thread on.
const OPEN: &str = ".reg .f32 %f<24>; .reg .b32 %r<16>; .reg .pred %p; .reg .b64 %x, %y; .reg .b32 %t, %c, %i, %s, %o;\n\
     .shared .align 16 .b8 tile[4096];\n\
     ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.global.f32 %f8, [%x];\n\
     mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;\n\
     mov.f32 %f4, %f0; mov.f32 %f5, %f0; mov.f32 %f6, %f0; mov.f32 %f7, %f0;\n\
     mov.u32 %t, %tid.x; shl.b32 %s, %t, 4; mov.u32 %o, tile; add.u32 %s, %s, %o; mov.u32 %c, %ctaid.x;\n\
     mad.lo.u32 %t, %c, 256, %t; mad.wide.u32 %x, %t, 16, %x; mad.wide.u32 %y, %t, 16, %y;\n";
const CLOSE: &str = "st.global.v4.f32 [%y], {%f0, %f1, %f2, %f3}; ret;\n}\n";

/// `count` steps, 64 times.
fn looped(count: usize, step: impl Fn(usize) -> String) -> String {
    let body: String = (0..count).map(step).collect();
    format!("mov.u32 %i, 0;\nLOOP:\n{body}add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 64; @%p bra LOOP;\n")
}

/// Reads 4 MiB and writes as much, 16 bytes a thread, with a sum between.
fn stream() -> String {
    let step = |_| {
        "ld.global.nc.v4.f32 {%f4, %f5, %f6, %f7}, [%x];\n\
         add.f32 %f4, %f4, %f0; add.f32 %f5, %f5, %f1; add.f32 %f6, %f6, %f2; add.f32 %f7, %f7, %f3;\n\
         st.global.v4.f32 [%y], {%f4, %f5, %f6, %f7};\n\
         add.u64 %x, %x, 65536; add.u64 %y, %y, 65536;\n"
            .to_string()
    };
    looped(1, step) + "sub.u64 %y, %y, 65536;\n"
}

/// Writes to shared memory, reads it back transposed, adds it up.
fn shared(n: usize) -> String {
    let (f, g) = (n % 4, 4 + n % 4);
    format!(
        "st.shared.v4.f32 [%s], {{%f0, %f1, %f2, %f3}}; bar.sync 0; ld.shared.v4.f32 {{%f9, %f10, %f11, %f12}}, [%s];\n\
         ld.shared.f32 %f{g}, [tile+{}]; add.f32 %f9, %f9, %f{g}; add.f32 %f{f}, %f{f}, %f9; bar.sync 0;\n",
        n * 64
    )
}

/// One step of a sum over the warp.
fn shuffle(n: usize) -> String {
    let f = n % 4;
    format!(
        "shfl.sync.bfly.b32 %r{f}, %r{f}, {}, 31, 0xffffffff; mov.b32 %f9, %r{f}; add.f32 %f{f}, %f{f}, %f9;\n\
         mov.b32 %r{f}, %f{f};\n",
        1 << (n % 5)
    )
}

fn mma(n: usize) -> String {
    let (c, a) = (4 * (n % 2), 9 + n % 8);
    format!(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f{0}, %f{1}, %f{2}, %f{3}}}, {{%r{4}, %r{5}, %r{4}, %r{5}}}, \
         {{%r{5}, %r{4}}}, {{%f{0}, %f{1}, %f{2}, %f{3}}};\n",
        c,
        c + 1,
        c + 2,
        c + 3,
        a % 16,
        (a + 1) % 16
    )
}

/// Lane instructions and seconds of one launch.
fn run(case: &Case, options: Options) -> Result<(f64, f64), Error> {
    let module = virtual_gpu::ptx::parser::parse(&case.text)?;
    let mut memory = Memory::new(1 << 30, 0);
    let mut globals = HashMap::new();
    for v in &module.variables {
        let address = memory.allocate(v.size.max(1) as u64, State::Live).ok_or("memory")?;
        globals.insert(v.name.clone(), address);
    }
    let kernels = virtual_gpu::decode::decode(&module, &globals)?;
    let kernel = Arc::new(kernels.into_iter().find(|k| k.name == case.name).ok_or("kernel")?);
    let mut buffers = Vec::new();
    for size in SIZES {
        let base = memory.allocate(size as u64, State::Live).ok_or("memory")?;
        memory.at(base).ok_or("memory")?.restore(0, &vec![0x3c; size], &vec![1; size]);
        buffers.push(base);
    }
    let params = case.params.iter().flat_map(|param| match param {
        Address(n) => buffers[*n].to_le_bytes().to_vec(),
        Number(n) => n.to_le_bytes().to_vec(),
    });
    let params = params.collect();
    let (grid, block) = (case.grid, [case.threads, 1, 1]);
    let shape = Shape { grid, block, dynamic_shared: 0, params, cooperative: false, number: 1 };
    let settings = Settings { options, seed: 0, accumulate: Accumulate::Exact, budget: 1 << 40 };
    // The first launch touches fresh memory; the best of the others counts.
    launch::run(&kernel, shape.clone(), &mut memory, settings, 108, 108);
    let mut best = f64::MAX;
    let mut instructions = 0.0;
    for number in 2..10 {
        let again = Shape { number, ..shape.clone() };
        let start = Instant::now();
        let outcome = launch::run(&kernel, again, &mut memory, settings, 108, 108);
        best = best.min(start.elapsed().as_secs_f64());
        instructions = outcome.counters.lane_instructions as f64;
        if let Some(report) = outcome.reports.first() {
            return Err(report.to_string().into());
        }
    }
    Ok((instructions, best))
}

fn main() -> Result<(), Error> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let counted = Options { traffic: true, ..Options::from_bits(0) };
    println!("{:24} {:>14} {:>14} {:>14}", "lane instructions / s", "bare", "counters", "sanitizers");
    for case in cases() {
        if !wanted.is_empty() && !wanted.iter().any(|part| case.name.contains(part)) {
            continue;
        }
        let mut line = format!("{:24}", case.name);
        for options in [Options::from_bits(0), counted, Options::ALL] {
            let (instructions, seconds) = run(&case, options)?;
            line += &format!(" {:>12.3} G", instructions / seconds / 1e9);
        }
        println!("{line}");
    }
    Ok(())
}
