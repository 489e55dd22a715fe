//! How fast the interpreter runs on this CPU: lane instructions a second, best of many runs. This says nothing about
//! any GPU.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use virtual_gpu::exec::{Accumulate, Settings, Shape, launch};
use virtual_gpu::memory::{Memory, State};
use virtual_gpu::sanitizer::Options;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let fixtures = include_str!("../tests/fixtures/kernels.ptx");
    let counted = Options { traffic: true, ..Options::from_bits(0) };
    println!("{:24} {:>14} {:>14} {:>14}", "lane instructions / s", "bare", "counters", "sanitizers");
    for (name, text) in [
        ("fma", &fma_loop()[..]),
        ("gemv_bf16", fixtures),
        ("softmax_argmax", fixtures),
        ("gemm_bf16", fixtures),
    ] {
        let mut line = format!("{name:24}");
        for options in [Options::from_bits(0), counted, Options::ALL] {
            let best = (0..7).map(|_| run(name, text, options)).collect::<Result<Vec<f64>, _>>()?;
            line += &format!(" {:>12.3} G", best.into_iter().fold(0.0, f64::max) / 1e9);
        }
        println!("{line}");
    }
    Ok(())
}

/// Eight chains of fma over 4096 steps.
fn fma_loop() -> String {
    let mut text = String::from(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry fma(.param .u64 x, .param .u64 y) {\n.reg .f32 %f<10>; .reg .b32 %i;\n\
         .reg .pred %p; .reg .b64 %x, %y; .reg .b32 %t, %c;\nld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.global.f32 %f8, [%x]; mov.u32 %i, 0;\n",
    );
    (0..8).for_each(|n| text += &format!("mov.f32 %f{n}, 0f3F80000{n};\n"));
    text += "LOOP:\n";
    (0..32).for_each(|n| text += &format!("fma.rn.f32 %f{0}, %f{0}, %f8, %f{0};\n", n % 8));
    text += "add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 128; @%p bra LOOP;\n";
    (1..8).for_each(|n| text += &format!("add.f32 %f0, %f0, %f{n};\n"));
    text + "mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mad.lo.u32 %t, %c, 256, %t; mad.wide.u32 %y, %t, 4, %y;\n\
            st.global.f32 [%y], %f0; ret;\n}\n"
}

fn run(name: &str, text: &str, options: Options) -> Result<f64, Box<dyn std::error::Error>> {
    let module = virtual_gpu::ptx::parser::parse(text)?;
    let mut memory = Memory::new(1 << 30, 0);
    let mut globals = HashMap::new();
    for v in &module.variables {
        let address = memory.allocate(v.size.max(1) as u64, State::Live).ok_or("memory")?;
        globals.insert(v.name.clone(), address);
    }
    let kernels = virtual_gpu::decode::decode(&module, &globals)?;
    let kernel = Arc::new(kernels.into_iter().find(|k| k.name == name).ok_or("kernel")?);
    let mut buffer = |bytes: usize| {
        let base = memory.allocate(bytes as u64, State::Live).unwrap_or(0);
        if let Some(allocation) = memory.at(base) {
            allocation.restore(0, &vec![0x3c; bytes], &vec![1; bytes]);
        }
        base
    };
    let (big, small, out) = (buffer(4 << 20), buffer(1 << 16), buffer(4 << 20));
    let word = |n: u32| n.to_le_bytes().to_vec();
    let long = |n: u64| n.to_le_bytes().to_vec();
    let (grid, threads, params) = match name {
        "fma" => ([8, 1, 1], 256, vec![long(big), long(out)]),
        "gemv_bf16" => ([128, 1, 1], 128, vec![long(big), long(small), long(out), word(512), word(4096)]),
        "softmax_argmax" => ([16, 1, 1], 256, vec![long(big), long(out), long(small), word(32_000)]),
        _ => ([4, 4, 1], 128, vec![long(big), long(big), long(out), word(256), word(256), word(512)]),
    };
    let params = params.concat();
    let shape =
        Shape { grid, block: [threads, 1, 1], dynamic_shared: 0, params, cooperative: false, number: 1 };
    let settings = Settings { options, seed: 0, accumulate: Accumulate::Exact, budget: 1 << 40 };
    // The first launch touches fresh memory; the second is timed.
    launch::run(&kernel, shape.clone(), &mut memory, settings, 108, 108);
    let again = Shape { number: 2, ..shape };
    let start = Instant::now();
    let outcome = launch::run(&kernel, again, &mut memory, settings, 108, 108);
    let seconds = start.elapsed().as_secs_f64();
    match outcome.reports.first() {
        Some(report) => Err(report.to_string().into()),
        None => Ok(outcome.counters.lane_instructions as f64 / seconds),
    }
}
