//! One instruction a case: inputs and the result that the PTX ISA gives, bit for bit.

use virtual_gpu::exec::{Accumulate, Settings, Shape, launch};
use virtual_gpu::memory::{Memory, State};
use virtual_gpu::sanitizer::Options;

/// Runs one warp of `body` over the inputs, 32 bytes a lane, and returns 8 bytes a lane. In `body`, `a b c e` are
/// inputs and `d` the result: `%a` for 32-bit registers, `%al` for 64-bit, `%as` for 16-bit, `%ap` for predicates
/// (input not zero).
pub fn run(body: &str, inputs: &[[u64; 4]; 32]) -> Result<[u64; 32], String> {
    let mut text = String::from(
        ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out) {\n\
         .reg .b64 %i, %o, %x, %t; .reg .b32 %lane; .reg .pred %dp, %dq;\n",
    );
    for v in ["a", "b", "c", "e", "d"] {
        text += &format!(".reg .b64 %{v}l; .reg .b32 %{v}, %{v}w; .reg .b16 %{v}s;\n");
        if v != "d" {
            text += &format!(".reg .pred %{v}p;\n");
        }
    }
    text += "ld.param.u64 %i, [in]; ld.param.u64 %o, [out]; mov.u32 %lane, %tid.x;\n\
             mad.wide.u32 %x, %lane, 32, %i; mad.wide.u32 %o, %lane, 8, %o; mov.b64 %dl, 0; mov.b32 %d, 0;\n\
             mov.b16 %ds, 0; setp.ne.u32 %dp, 0, 0; setp.ne.u32 %dq, 0, 0;\n";
    for (n, v) in ["a", "b", "c", "e"].iter().enumerate() {
        text += &format!(
            "ld.global.u64 %{v}l, [%x+{}]; cvt.u32.u64 %{v}, %{v}l; cvt.u16.u64 %{v}s, %{v}l;\
             setp.ne.u64 %{v}p, %{v}l, 0;\n",
            n * 8
        );
    }
    text += body;
    let result = body.rsplit("//").next().unwrap_or("").trim();
    text += match result {
        "16" => "\ncvt.u64.u16 %dl, %ds;\n",
        "64" => "\n",
        "p" => "\nselp.u64 %dl, 1, 0, %dp;\n",
        "pq" => "\nselp.u64 %dl, 1, 0, %dp; selp.u64 %t, 2, 0, %dq; or.b64 %dl, %dl, %t;\n",
        _ => "\ncvt.u64.u32 %dl, %d;\n",
    };
    text += "st.global.u64 [%o], %dl; ret;\n}\n";
    let module = virtual_gpu::ptx::parser::parse(&text).map_err(|e| e.to_string())?;
    let kernels = virtual_gpu::decode::decode(&module, &Default::default()).map_err(|e| e.to_string())?;
    let mut memory = Memory::new(1 << 20, 0);
    let input = memory.allocate(1024, State::Live).unwrap();
    let output = memory.allocate(256, State::Live).unwrap();
    let bytes: Vec<u8> = inputs.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    memory.at(input).unwrap().restore(0, &bytes, &[1; 1024]);
    let params = [input.to_le_bytes(), output.to_le_bytes()].concat();
    let (grid, block) = ([1; 3], [32, 1, 1]);
    let shape = Shape { grid, block, dynamic_shared: 0, params, cooperative: false, number: 1 };
    let settings =
        Settings { options: Options::ALL, seed: 0, accumulate: Accumulate::Exact, budget: 1 << 20 };
    let kernel = std::sync::Arc::new(kernels.into_iter().next().unwrap());
    let outcome = launch::run(&kernel, shape, &mut memory, settings, 1, 1);
    if let Some(report) = outcome.reports.first() {
        return Err(report.to_string());
    }
    let (bytes, _) = memory.at(output).unwrap().snapshot(0, 256);
    Ok(std::array::from_fn(|l| u64::from_le_bytes(bytes[l * 8..l * 8 + 8].try_into().unwrap())))
}

fn f(x: f32) -> u64 {
    u64::from(x.to_bits())
}

fn g(x: f64) -> u64 {
    x.to_bits()
}

fn check(cases: &[(&str, [u64; 4], u64)]) {
    let mut failures = Vec::new();
    for (body, input, want) in cases {
        // Full warp, and half of it: both paths of every handler.
        let inputs = [*input; 32];
        let half = format!("setp.lt.u32 %dq, %lane, 16;\n@%dq {body}");
        match run(body, &inputs) {
            Ok(got) if got.iter().all(|g| g == want) => {}
            other => failures.push(format!("{body} {input:x?}: {:x?}, want {want:x}", other.map(|o| o[0]))),
        }
        if body.contains("%dq") || body.contains("%d|") || body.matches(';').count() > 1 {
            continue;
        }
        match run(&half, &inputs) {
            Ok(got) if got[..16].iter().all(|g| g == want) && got[16..].iter().all(|&g| g == 0) => {}
            other => failures.push(format!("half warp: {body} {input:x?}: {other:x?}, want {want:x}")),
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

const M: u64 = 0xffff_ffff;
const NAN: u64 = 0x7fff_ffff;

#[test]
fn integers() {
    let neg = |x: i32| u64::from(x as u32);
    let long = |x: i64| x as u64;
    check(&[
        ("add.s32 %d, %a, %b;", [5, neg(-7), 0, 0], neg(-2)),
        ("add.u32 %d, %a, %b;", [M, 2, 0, 0], 1),
        ("add.s64 %dl, %al, %bl; // 64", [u64::MAX, 2, 0, 0], 1),
        ("add.s16 %ds, %as, %bs; // 16", [0xffff, 2, 0, 0], 1),
        ("sub.s32 %d, %a, %b;", [3, 5, 0, 0], neg(-2)),
        ("sub.u64 %dl, %al, %bl; // 64", [0, 1, 0, 0], u64::MAX),
        ("mul.lo.s32 %d, %a, %b;", [neg(-3), 7, 0, 0], neg(-21)),
        ("mul.lo.u64 %dl, %al, %bl; // 64", [1 << 40, 1 << 30, 0, 0], 0),
        ("mul.hi.u32 %d, %a, %b;", [M, M, 0, 0], M - 1),
        ("mul.hi.s32 %d, %a, %b;", [neg(-2), 3, 0, 0], M),
        ("mul.hi.u64 %dl, %al, %bl; // 64", [u64::MAX, u64::MAX, 0, 0], u64::MAX - 1),
        ("mul.hi.s64 %dl, %al, %bl; // 64", [u64::MAX, 5, 0, 0], u64::MAX),
        ("mul.wide.u32 %dl, %a, %b; // 64", [M, M, 0, 0], 0xffff_fffe_0000_0001),
        ("mul.wide.s32 %dl, %a, %b; // 64", [neg(-2), 3, 0, 0], long(-6)),
        ("mul.wide.u16 %d, %as, %bs;", [0xffff, 0xffff, 0, 0], 0xfffe_0001),
        ("mul.wide.s16 %d, %as, %bs;", [0xffff, 3, 0, 0], neg(-3)),
        ("mad.lo.s32 %d, %a, %b, %c;", [neg(-3), 7, 1, 0], neg(-20)),
        ("mad.hi.u32 %d, %a, %b, %c;", [M, M, 3, 0], 1),
        ("mad.wide.u32 %dl, %a, %b, %cl; // 64", [M, 2, 5, 0], 0x2_0000_0003),
        ("mad.wide.s32 %dl, %a, %b, %cl; // 64", [neg(-4), 2, 5, 0], long(-3)),
        ("mad.lo.s64 %dl, %al, %bl, %cl; // 64", [3, 4, 5, 0], 17),
        ("div.s32 %d, %a, %b;", [neg(-7), 2, 0, 0], neg(-3)),
        ("div.u32 %d, %a, %b;", [neg(-7), 2, 0, 0], 0x7fff_fffc),
        ("div.u32 %d, %a, %b;", [5, 0, 0, 0], M),
        ("div.s64 %dl, %al, %bl; // 64", [long(-9), 4, 0, 0], long(-2)),
        ("div.s32 %d, %a, %b;", [0x8000_0000, M, 0, 0], 0x8000_0000),
        ("rem.s32 %d, %a, %b;", [neg(-7), 3, 0, 0], neg(-1)),
        ("rem.u32 %d, %a, %b;", [17, 5, 0, 0], 2),
        ("rem.u64 %dl, %al, %bl; // 64", [1 << 40, 1000, 0, 0], (1 << 40) % 1000),
        ("min.s32 %d, %a, %b;", [neg(-7), 3, 0, 0], neg(-7)),
        ("min.u32 %d, %a, %b;", [neg(-7), 3, 0, 0], 3),
        ("max.s32 %d, %a, %b;", [neg(-7), 3, 0, 0], 3),
        ("max.u64 %dl, %al, %bl; // 64", [u64::MAX, 3, 0, 0], u64::MAX),
        ("max.s64 %dl, %al, %bl; // 64", [u64::MAX, 3, 0, 0], 3),
        ("min.s16 %ds, %as, %bs; // 16", [0xfffe, 3, 0, 0], 0xfffe),
        ("max.u16 %ds, %as, %bs; // 16", [0xfffe, 3, 0, 0], 0xfffe),
        ("neg.s32 %d, %a;", [5, 0, 0, 0], neg(-5)),
        ("abs.s32 %d, %a;", [neg(-5), 0, 0, 0], 5),
        ("abs.s64 %dl, %al; // 64", [long(-5), 0, 0, 0], 5),
        ("neg.s16 %ds, %as; // 16", [1, 0, 0, 0], 0xffff),
        ("sad.u32 %d, %a, %b, %c;", [3, 10, 100, 0], 107),
        ("sad.s32 %d, %a, %b, %c;", [neg(-3), 10, 100, 0], 113),
    ]);
}

#[test]
fn bits() {
    check(&[
        ("and.b32 %d, %a, %b;", [0xf0f0, 0xff00, 0, 0], 0xf000),
        ("or.b64 %dl, %al, %bl; // 64", [1 << 63, 1, 0, 0], (1 << 63) | 1),
        ("xor.b16 %ds, %as, %bs; // 16", [0xffff, 0x0ff0, 0, 0], 0xf00f),
        ("not.b32 %d, %a;", [0, 0, 0, 0], M),
        ("cnot.b32 %d, %a;", [0, 0, 0, 0], 1),
        ("shl.b32 %d, %a, %b;", [1, 31, 0, 0], 1 << 31),
        ("shl.b32 %d, %a, %b;", [1, 32, 0, 0], 0),
        ("shl.b64 %dl, %al, %b; // 64", [1, 63, 0, 0], 1 << 63),
        ("shl.b64 %dl, %al, %b; // 64", [1, 64, 0, 0], 0),
        ("shl.b16 %ds, %as, %b; // 16", [0x8001, 1, 0, 0], 2),
        ("shr.u32 %d, %a, %b;", [0x8000_0000, 31, 0, 0], 1),
        ("shr.u32 %d, %a, %b;", [0x8000_0000, 99, 0, 0], 0),
        ("shr.s32 %d, %a, %b;", [0x8000_0000, 99, 0, 0], M),
        ("shr.s64 %dl, %al, %b; // 64", [1 << 63, 70, 0, 0], u64::MAX),
        ("shr.s16 %ds, %as, %b; // 16", [0x8000, 3, 0, 0], 0xf000),
        ("shr.u16 %ds, %as, %b; // 16", [0x8000, 15, 0, 0], 1),
        ("shf.l.wrap.b32 %d, %a, %b, %c;", [0x8000_0000, 1, 1, 0], 3),
        ("shf.l.wrap.b32 %d, %a, %b, %c;", [7, 9, 32, 0], 9),
        ("shf.l.clamp.b32 %d, %a, %b, %c;", [7, 9, 40, 0], 7),
        ("shf.r.wrap.b32 %d, %a, %b, %c;", [2, 1, 1, 0], 0x8000_0001),
        ("shf.r.clamp.b32 %d, %a, %b, %c;", [2, 1, 32, 0], 1),
        ("bfe.u32 %d, %a, %b, %c;", [0xabcd_1234, 8, 8, 0], 0x12),
        ("bfe.s32 %d, %a, %b, %c;", [0xabcd_1234, 24, 8, 0], 0xffff_ffab),
        ("bfe.u32 %d, %a, %b, %c;", [0xabcd_1234, 0, 0, 0], 0),
        ("bfe.s32 %d, %a, %b, %c;", [0x8000_0000, 28, 8, 0], 0xffff_fff8),
        ("bfe.u64 %dl, %al, %b, %c; // 64", [0x1234_5678_9abc_def0, 32, 16, 0], 0x5678),
        ("bfi.b32 %d, %a, %b, %c, %e;", [0xff, 0, 4, 8], 0xff0),
        ("bfi.b32 %d, %a, %b, %c, %e;", [0xff, 7, 40, 8], 7),
        ("bfi.b64 %dl, %al, %bl, %c, %e; // 64", [0x5, 0, 62, 8], 1 << 62),
        ("prmt.b32 %d, %a, %b, %c;", [0x3322_1100, 0x7766_5544, 0x5410, 0], 0x5544_1100),
        ("prmt.b32 %d, %a, %b, %c;", [0x3322_1180, 0, 0x0008, 0], 0x8080_80ff),
        ("lop3.b32 %d, %a, %b, %c, 0x96;", [0b1100, 0b1010, 0b0110, 0], 0b1100 ^ 0b1010 ^ 0b0110),
        ("lop3.b32 %d, %a, %b, %c, 0xE8;", [0b1100, 0b1010, 0b0110, 0], 0b1110),
        ("lop3.b32 %d, %a, %b, %c, 0xCA;", [0b1100, 0b1010, 0b0110, 0], 0b1010),
        ("popc.b32 %d, %a;", [0xf0f0, 0, 0, 0], 8),
        ("popc.b64 %d, %al;", [u64::MAX, 0, 0, 0], 64),
        ("clz.b32 %d, %a;", [1, 0, 0, 0], 31),
        ("clz.b64 %d, %al;", [0, 0, 0, 0], 64),
        ("bfind.u32 %d, %a;", [0x100, 0, 0, 0], 8),
        ("bfind.u32 %d, %a;", [0, 0, 0, 0], M),
        ("bfind.shiftamt.u32 %d, %a;", [0x100, 0, 0, 0], 23),
        ("bfind.shiftamt.u32 %d, %a;", [0, 0, 0, 0], M),
        ("bfind.s32 %d, %a;", [0xffff_fffe, 0, 0, 0], 0),
        ("brev.b32 %d, %a;", [1, 0, 0, 0], 1 << 31),
        ("brev.b64 %dl, %al; // 64", [1, 0, 0, 0], 1 << 63),
        ("bmsk.clamp.b32 %d, %a, %b;", [4, 8, 0, 0], 0xff0),
        ("dp4a.s32.s32 %d, %a, %b, %c;", [0xff01_0203, 0x0102_0304, 10, 0], 10 - 1 + 2 + 6 + 12),
        ("dp4a.u32.u32 %d, %a, %b, %c;", [0xff01_0203, 0x0102_0304, 10, 0], 10 + 255 + 2 + 6 + 12),
        ("dp4a.u32.s32 %d, %a, %b, %c;", [0x0000_00ff, 0x0000_00ff, 0, 0], (-255i32) as u32 as u64),
    ]);
}

#[test]
fn moves_and_selections() {
    check(&[
        ("mov.u32 %d, %a;", [7, 0, 0, 0], 7),
        ("mov.f32 %d, 0f3F800000;", [0; 4], 0x3f80_0000),
        ("mov.b64 %dl, %al; // 64", [1 << 50, 0, 0, 0], 1 << 50),
        ("mov.b32 %d, {%as, %bs};", [0x1_2222, 0x3333, 0, 0], 0x3333_2222),
        ("mov.b64 %dl, {%a, %b}; // 64", [1, 2, 0, 0], 0x2_0000_0001),
        ("mov.b64 %dl, {%as, %bs, %cs, %es}; // 64", [1, 2, 3, 4], 0x0004_0003_0002_0001),
        ("mov.b32 {%ds, %as}, %b; // 16", [0, 0x5555_6666, 0, 0], 0x6666),
        ("mov.b32 {%as, %ds}, %b; // 16", [0, 0x5555_6666, 0, 0], 0x5555),
        ("mov.b32 {_, %ds}, %b; // 16", [0, 0x5555_6666, 0, 0], 0x5555),
        ("mov.b64 {%aw, %d}, %bl;", [0, 0x7777_0000_0001, 0, 0], 0x7777),
        ("selp.b32 %d, %a, %b, %cp;", [1, 2, 1, 0], 1),
        ("selp.b32 %d, %a, %b, %cp;", [1, 2, 0, 0], 2),
        ("selp.b64 %dl, %al, %bl, %cp; // 64", [1 << 40, 2, 1, 0], 1 << 40),
        ("selp.b16 %ds, %as, %bs, %cp; // 16", [1, 2, 0, 0], 2),
        ("slct.b32.s32 %d, %a, %b, %c;", [1, 2, M, 0], 2),
        ("slct.b32.f32 %d, %a, %b, %c;", [1, 2, f(0.5), 0], 1),
        ("setp.lt.s32 %dp, %a, %b; // p", [M, 1, 0, 0], 1),
        ("setp.lt.u32 %dp, %a, %b; // p", [M, 1, 0, 0], 0),
        ("setp.hi.u32 %dp, %a, %b; // p", [M, 1, 0, 0], 1),
        ("setp.ls.u32 %dp, %a, %b; // p", [1, 1, 0, 0], 1),
        ("setp.ge.s64 %dp, %al, %bl; // p", [u64::MAX, 0, 0, 0], 0),
        ("setp.ne.b16 %dp, %as, %bs; // p", [0x1_0001, 1, 0, 0], 0),
        ("setp.gt.s16 %dp, %as, %bs; // p", [0xffff, 0, 0, 0], 0),
        ("setp.eq.and.u32 %dp|%dq, %a, %b, %cp; // pq", [1, 1, 1, 0], 1),
        ("setp.eq.and.u32 %dp|%dq, %a, %b, %cp; // pq", [1, 2, 1, 0], 2),
        ("setp.eq.or.u32 %dp, %a, %b, !%cp; // p", [1, 2, 0, 0], 1),
        ("setp.eq.xor.u32 %dp, %a, %b, %cp; // p", [1, 1, 1, 0], 0),
        ("setp.lt.f32 %dp, %a, %b; // p", [f(1.0), f(2.0), 0, 0], 1),
        ("setp.lt.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 0),
        ("setp.ltu.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 1),
        ("setp.ne.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 0),
        ("setp.neu.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 1),
        ("setp.equ.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 1),
        ("setp.num.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 0),
        ("setp.nan.f32 %dp, %a, %b; // p", [NAN, f(2.0), 0, 0], 1),
        ("setp.eq.f32 %dp, %a, %b; // p", [f(0.0), f(-0.0), 0, 0], 1),
        ("setp.eq.ftz.f32 %dp, %a, %b; // p", [1, 0, 0, 0], 1),
        ("setp.geu.f64 %dp, %al, %bl; // p", [g(1.0), g(2.0), 0, 0], 0),
        ("setp.gt.f16 %dp, %as, %bs; // p", [0x3c00, 0xbc00, 0, 0], 1),
        ("setp.lt.bf16 %dp, %as, %bs; // p", [0x3f80, 0x4000, 0, 0], 1),
        ("and.pred %dp, %ap, %bp; // p", [1, 0, 0, 0], 0),
        ("or.pred %dp, %ap, %bp; // p", [1, 0, 0, 0], 1),
        ("xor.pred %dp, %ap, %bp; // p", [1, 1, 0, 0], 0),
        ("not.pred %dp, %ap; // p", [0; 4], 1),
        ("mov.pred %dp, %ap; // p", [1, 0, 0, 0], 1),
        ("testp.finite.f32 %dp, %a; // p", [f(1.0), 0, 0, 0], 1),
        ("testp.infinite.f32 %dp, %a; // p", [f(f32::INFINITY), 0, 0, 0], 1),
        ("testp.notanumber.f32 %dp, %a; // p", [NAN, 0, 0, 0], 1),
        ("testp.subnormal.f32 %dp, %a; // p", [1, 0, 0, 0], 1),
    ]);
}

#[test]
fn floats() {
    let tiny = f32::MIN_POSITIVE;
    let next = |x: f32| u64::from(x.to_bits() + 1);
    let ulp = f32::EPSILON;
    check(&[
        ("add.f32 %d, %a, %b;", [f(1.5), f(2.25), 0, 0], f(3.75)),
        ("add.rn.f32 %d, %a, %b;", [f(1.0), f(ulp / 2.0), 0, 0], f(1.0)),
        ("add.rp.f32 %d, %a, %b;", [f(1.0), f(ulp / 4.0), 0, 0], next(1.0)),
        ("add.rm.f32 %d, %a, %b;", [f(-1.0), f(-ulp / 4.0), 0, 0], next(-1.0)),
        ("add.rz.f32 %d, %a, %b;", [f(1.0), f(ulp * 0.75), 0, 0], f(1.0)),
        ("add.rz.f32 %d, %a, %b;", [f(-1.0), f(-ulp * 0.75), 0, 0], f(-1.0)),
        ("add.rm.f32 %d, %a, %b;", [f(1.0), f(-1.0), 0, 0], f(-0.0)),
        ("add.f32 %d, %a, %b;", [f(f32::INFINITY), f(f32::NEG_INFINITY), 0, 0], NAN),
        ("add.f32 %d, %a, %b;", [0xffc0_1234, f(1.0), 0, 0], NAN),
        ("add.ftz.f32 %d, %a, %b;", [1, 1, 0, 0], 0),
        ("add.f32 %d, %a, %b;", [1, 1, 0, 0], 2),
        ("add.sat.f32 %d, %a, %b;", [f(0.7), f(0.7), 0, 0], f(1.0)),
        ("add.sat.f32 %d, %a, %b;", [NAN, f(0.7), 0, 0], f(0.0)),
        ("sub.f32 %d, %a, %b;", [f(1.5), f(2.25), 0, 0], f(-0.75)),
        ("sub.rp.f32 %d, %a, %b;", [f(1.0), f(-ulp / 4.0), 0, 0], next(1.0)),
        ("mul.f32 %d, %a, %b;", [f(-1.5), f(2.0), 0, 0], f(-3.0)),
        ("mul.ftz.f32 %d, %a, %b;", [f(tiny), f(-0.5), 0, 0], f(-0.0)),
        ("mul.rp.f32 %d, %a, %b;", [next(1.0), next(1.0), 0, 0], u64::from(1.0f32.to_bits() + 3)),
        ("mul.rz.f32 %d, %a, %b;", [f(f32::MAX), f(2.0), 0, 0], f(f32::MAX)),
        ("mul.rm.f32 %d, %a, %b;", [f(f32::MAX), f(-2.0), 0, 0], f(f32::NEG_INFINITY)),
        ("mul.rp.f32 %d, %a, %b;", [1, 1, 0, 0], 1),
        ("mul.rm.f32 %d, %a, %b;", [0x8000_0001, 1, 0, 0], 0x8000_0001),
        ("mul.rz.f32 %d, %a, %b;", [0x8000_0001, 1, 0, 0], 0x8000_0000),
        ("fma.rn.f32 %d, %a, %b, %c;", [next(1.0), next(1.0), f(-1.0), 0], f(2.0 * ulp + ulp * ulp)),
        ("fma.rm.f32 %d, %a, %b, %c;", [f(1.0), f(ulp / 4.0), f(-1.0), 0], u64::from((-1.0f32).to_bits())),
        ("fma.rm.f32 %d, %a, %b, %c;", [f(0.3), f(252.0), 0x4b40_0001, 0], 0x4b40_004c),
        ("fma.rp.f32 %d, %a, %b, %c;", [f(ulp), f(ulp), f(1.0), 0], next(1.0)),
        ("fma.rz.f32 %d, %a, %b, %c;", [f(ulp), f(-ulp), f(1.0), 0], u64::from(1.0f32.to_bits() - 1)),
        ("mad.rn.f32 %d, %a, %b, %c;", [f(2.0), f(3.0), f(4.0), 0], f(10.0)),
        ("fma.rn.ftz.sat.f32 %d, %a, %b, %c;", [f(2.0), f(3.0), f(4.0), 0], f(1.0)),
        ("div.rn.f32 %d, %a, %b;", [f(1.0), f(3.0), 0, 0], f(1.0 / 3.0)),
        ("div.rz.f32 %d, %a, %b;", [f(2.0), f(3.0), 0, 0], u64::from((2.0f32 / 3.0).to_bits() - 1)),
        ("div.rp.f32 %d, %a, %b;", [f(1.0), f(3.0), 0, 0], f(1.0 / 3.0)),
        ("div.rm.f32 %d, %a, %b;", [f(1.0), f(3.0), 0, 0], u64::from((1.0f32 / 3.0).to_bits() - 1)),
        ("div.full.f32 %d, %a, %b;", [f(6.0), f(3.0), 0, 0], f(2.0)),
        ("div.approx.ftz.f32 %d, %a, %b;", [f(6.0), f(3.0), 0, 0], f(2.0)),
        ("rcp.rn.f32 %d, %a;", [f(-4.0), 0, 0, 0], f(-0.25)),
        ("rcp.approx.ftz.f32 %d, %a;", [f(0.0), 0, 0, 0], f(f32::INFINITY)),
        ("rcp.rp.f32 %d, %a;", [f(3.0), 0, 0, 0], f(1.0 / 3.0)),
        ("sqrt.rn.f32 %d, %a;", [f(2.0), 0, 0, 0], f(2.0f32.sqrt())),
        ("sqrt.rz.f32 %d, %a;", [f(5.0), 0, 0, 0], u64::from(5.0f32.sqrt().to_bits() - 1)),
        ("sqrt.approx.f32 %d, %a;", [f(-1.0), 0, 0, 0], NAN),
        ("rsqrt.approx.f32 %d, %a;", [f(16.0), 0, 0, 0], f(0.25)),
        ("rsqrt.approx.ftz.f32 %d, %a;", [f(0.0), 0, 0, 0], f(f32::INFINITY)),
        ("ex2.approx.f32 %d, %a;", [f(10.0), 0, 0, 0], f(1024.0)),
        ("ex2.approx.f32 %d, %a;", [f(-149.0), 0, 0, 0], 1),
        ("ex2.approx.ftz.f32 %d, %a;", [f(-130.0), 0, 0, 0], 0),
        ("ex2.approx.ftz.f32 %d, %a;", [f(f32::NEG_INFINITY), 0, 0, 0], 0),
        ("ex2.approx.ftz.f32 %d, %a;", [f(128.0), 0, 0, 0], f(f32::INFINITY)),
        ("lg2.approx.f32 %d, %a;", [f(0.125), 0, 0, 0], f(-3.0)),
        ("lg2.approx.ftz.f32 %d, %a;", [f(0.0), 0, 0, 0], f(f32::NEG_INFINITY)),
        ("lg2.approx.f32 %d, %a;", [f(-1.0), 0, 0, 0], NAN),
        ("sin.approx.f32 %d, %a;", [f(0.0), 0, 0, 0], f(0.0)),
        ("cos.approx.ftz.f32 %d, %a;", [f(0.0), 0, 0, 0], f(1.0)),
        ("tanh.approx.f32 %d, %a;", [f(f32::INFINITY), 0, 0, 0], f(1.0)),
        ("min.f32 %d, %a, %b;", [NAN, f(2.0), 0, 0], f(2.0)),
        ("max.f32 %d, %a, %b;", [f(1.0), NAN, 0, 0], f(1.0)),
        ("max.NaN.f32 %d, %a, %b;", [f(1.0), NAN, 0, 0], NAN),
        ("min.f32 %d, %a, %b;", [f(0.0), f(-0.0), 0, 0], f(-0.0)),
        ("max.f32 %d, %a, %b;", [f(-0.0), f(0.0), 0, 0], f(0.0)),
        ("neg.f32 %d, %a;", [f(1.0), 0, 0, 0], f(-1.0)),
        ("abs.ftz.f32 %d, %a;", [0x8000_0001, 0, 0, 0], 0),
        ("copysign.f32 %d, %a, %b;", [f(-1.0), f(3.0), 0, 0], f(-3.0)),
        ("add.f64 %dl, %al, %bl; // 64", [g(0.1), g(0.2), 0, 0], g(0.1 + 0.2)),
        ("mul.rn.f64 %dl, %al, %bl; // 64", [g(0.1), g(0.2), 0, 0], g(0.1 * 0.2)),
        (
            "fma.rn.f64 %dl, %al, %bl, %cl; // 64",
            [g(0.1), g(10.0), g(-1.0), 0],
            g(0.1f64.mul_add(10.0, -1.0)),
        ),
        ("div.rn.f64 %dl, %al, %bl; // 64", [g(1.0), g(3.0), 0, 0], g(1.0 / 3.0)),
        ("sqrt.rn.f64 %dl, %al; // 64", [g(2.0), 0, 0, 0], g(2f64.sqrt())),
        ("neg.f64 %dl, %al; // 64", [g(2.0), 0, 0, 0], g(-2.0)),
    ]);
}

#[test]
fn conversions() {
    let neg = |x: i32| u64::from(x as u32);
    check(&[
        ("cvt.u64.u32 %dl, %a; // 64", [M, 0, 0, 0], M),
        ("cvt.s64.s32 %dl, %a; // 64", [M, 0, 0, 0], u64::MAX),
        ("cvt.u32.u64 %d, %al;", [0x1_0000_0005, 0, 0, 0], 5),
        ("cvt.s32.s8 %d, %as;", [0x80, 0, 0, 0], neg(-128)),
        ("cvt.u32.u8 %d, %as;", [0x180, 0, 0, 0], 0x80),
        ("cvt.s16.s32 %ds, %a; // 16", [0x1_8000, 0, 0, 0], 0x8000),
        ("cvt.u32.u16 %d, %as;", [0xffff, 0, 0, 0], 0xffff),
        ("cvt.s32.s16 %d, %as;", [0xffff, 0, 0, 0], M),
        ("cvt.s64.s32 %dl, %al; // 64", [0x1_ffff_fffe, 0, 0, 0], u64::MAX - 1),
        ("cvt.sat.s8.s32 %d, %a;", [300, 0, 0, 0], 127),
        ("cvt.sat.u8.s32 %d, %a;", [neg(-5), 0, 0, 0], 0),
        ("cvt.sat.s32.s64 %d, %al;", [1 << 40, 0, 0, 0], 0x7fff_ffff),
        ("cvt.rni.s32.f32 %d, %a;", [f(2.5), 0, 0, 0], 2),
        ("cvt.rni.s32.f32 %d, %a;", [f(3.5), 0, 0, 0], 4),
        ("cvt.rzi.s32.f32 %d, %a;", [f(-2.9), 0, 0, 0], neg(-2)),
        ("cvt.rmi.s32.f32 %d, %a;", [f(-2.1), 0, 0, 0], neg(-3)),
        ("cvt.rpi.s32.f32 %d, %a;", [f(2.1), 0, 0, 0], 3),
        ("cvt.rzi.s32.f32 %d, %a;", [f(1e20), 0, 0, 0], 0x7fff_ffff),
        ("cvt.rzi.u32.f32 %d, %a;", [f(-1.0), 0, 0, 0], 0),
        ("cvt.rzi.s32.f32 %d, %a;", [NAN, 0, 0, 0], 0),
        ("cvt.rzi.s64.f32 %dl, %a; // 64", [NAN, 0, 0, 0], 1 << 63),
        ("cvt.rzi.u64.f32 %dl, %a; // 64", [f(1e10), 0, 0, 0], 10_000_000_000),
        ("cvt.rzi.s8.f32 %d, %a;", [f(-200.0), 0, 0, 0], neg(-128)),
        ("cvt.rni.s32.f64 %d, %al;", [g(-2.5), 0, 0, 0], neg(-2)),
        ("cvt.rni.s32.f16 %d, %as;", [0x4100, 0, 0, 0], 2),
        ("cvt.rn.f32.s32 %d, %a;", [neg(-7), 0, 0, 0], f(-7.0)),
        ("cvt.rn.f32.u32 %d, %a;", [M, 0, 0, 0], f(4_294_967_296.0)),
        ("cvt.rz.f32.u32 %d, %a;", [M, 0, 0, 0], 0x4f7f_ffff),
        ("cvt.rn.f32.s64 %d, %al;", [u64::MAX, 0, 0, 0], f(-1.0)),
        ("cvt.rn.f32.u8 %d, %as;", [200, 0, 0, 0], f(200.0)),
        ("cvt.rn.f32.s8 %d, %as;", [200, 0, 0, 0], f(-56.0)),
        ("cvt.rn.f32.s16 %d, %as;", [0xffff, 0, 0, 0], f(-1.0)),
        ("cvt.rn.f64.s32 %dl, %a; // 64", [neg(-7), 0, 0, 0], g(-7.0)),
        ("cvt.rn.f16.s32 %ds, %a; // 16", [2049, 0, 0, 0], 0x6800),
        ("cvt.rn.bf16.u32 %ds, %a; // 16", [257, 0, 0, 0], 0x4380),
        ("cvt.f64.f32 %dl, %a; // 64", [f(0.1), 0, 0, 0], g(f64::from(0.1f32))),
        ("cvt.rn.f32.f64 %d, %al;", [g(0.1), 0, 0, 0], f(0.1)),
        ("cvt.rz.f32.f64 %d, %al;", [g(0.1), 0, 0, 0], u64::from(0.1f32.to_bits() - 1)),
        ("cvt.rp.f32.f64 %d, %al;", [g(1e-60), 0, 0, 0], 1),
        ("cvt.rni.f32.f32 %d, %a;", [f(2.5), 0, 0, 0], f(2.0)),
        ("cvt.rmi.f32.f32 %d, %a;", [f(-0.5), 0, 0, 0], f(-1.0)),
        ("cvt.rzi.f32.f32 %d, %a;", [f(-0.5), 0, 0, 0], f(-0.0)),
        ("cvt.rpi.f32.f32 %d, %a;", [f(0.5), 0, 0, 0], f(1.0)),
        ("cvt.sat.f32.f32 %d, %a;", [f(-3.0), 0, 0, 0], f(0.0)),
        ("cvt.ftz.f32.f32 %d, %a;", [5, 0, 0, 0], 0),
        ("cvt.f32.f16 %d, %as;", [0x3555, 0, 0, 0], f(0.333_251_95)),
        ("cvt.f32.f16 %d, %as;", [1, 0, 0, 0], f(5.960_464_5e-8)),
        ("cvt.f32.bf16 %d, %as;", [0x3f80, 0, 0, 0], f(1.0)),
        ("cvt.rn.f16.f32 %ds, %a; // 16", [f(65519.0), 0, 0, 0], 0x7bff),
        ("cvt.rn.f16.f32 %ds, %a; // 16", [f(65520.0), 0, 0, 0], 0x7c00),
        ("cvt.rz.f16.f32 %ds, %a; // 16", [f(1e9), 0, 0, 0], 0x7bff),
        ("cvt.rm.f16.f32 %ds, %a; // 16", [f(-1e9), 0, 0, 0], 0xfc00),
        ("cvt.rp.f16.f32 %ds, %a; // 16", [f(1e-9), 0, 0, 0], 1),
        ("cvt.rn.f16.f32 %ds, %a; // 16", [NAN, 0, 0, 0], 0x7fff),
        ("cvt.rn.bf16.f32 %ds, %a; // 16", [f(1.0 + 1.0 / 256.0), 0, 0, 0], 0x3f80),
        ("cvt.rn.bf16.f32 %ds, %a; // 16", [f(1.0 + 3.0 / 256.0), 0, 0, 0], 0x3f82),
        ("cvt.rz.bf16.f32 %ds, %a; // 16", [f(1.99), 0, 0, 0], 0x3ffe),
        ("cvt.rn.relu.bf16.f32 %ds, %a; // 16", [f(-2.0), 0, 0, 0], 0),
        ("cvt.rn.bf16x2.f32 %d, %a, %b;", [f(1.0), f(2.0), 0, 0], 0x3f80_4000),
        ("cvt.rn.f16x2.f32 %d, %a, %b;", [f(1.0), f(2.0), 0, 0], 0x3c00_4000),
        ("cvt.rn.relu.f16x2.f32 %d, %a, %b;", [f(-1.0), f(2.0), 0, 0], 0x4000),
        ("cvt.rna.tf32.f32 %d, %a;", [0x3f80_1000, 0, 0, 0], 0x3f80_2000),
        ("cvta.to.global.u64 %dl, %al; // 64", [77, 0, 0, 0], 77),
    ]);
}

#[test]
fn halves() {
    check(&[
        ("add.f16 %ds, %as, %bs; // 16", [0x3c00, 0x4000, 0, 0], 0x4200),
        ("add.rn.f16 %ds, %as, %bs; // 16", [0x3c00, 0x1000, 0, 0], 0x3c00),
        ("sub.f16 %ds, %as, %bs; // 16", [0x3c00, 0x4000, 0, 0], 0xbc00),
        ("mul.f16 %ds, %as, %bs; // 16", [0xbc00, 0x0000, 0, 0], 0x8000),
        ("mul.f16x2 %d, %a, %b;", [0x4000_3c00, 0x4000_4000, 0, 0], 0x4400_4000),
        ("fma.rn.f16 %ds, %as, %bs, %cs; // 16", [0x3c01, 0x3c03, 0xbc00, 0], 0x1c01),
        ("fma.rn.f16x2 %d, %a, %b, %c;", [0x4000_3c00, 0x4000_4000, 0x3c00_3c00, 0], 0x4500_4200),
        ("fma.rn.relu.f16 %ds, %as, %bs, %cs; // 16", [0x3c00, 0xbc00, 0, 0], 0),
        ("fma.rn.bf16 %ds, %as, %bs, %cs; // 16", [0x4000, 0x4000, 0x3f80, 0], 0x40a0),
        ("fma.rn.bf16x2 %d, %a, %b, %c;", [0x3f80_4000, 0x4000_4000, 0, 0], 0x4000_4080),
        ("add.bf16x2 %d, %a, %b;", [0x3f80_4000, 0x4000_4000, 0, 0], 0x4040_4080),
        ("mul.bf16 %ds, %as, %bs; // 16", [0x4000, 0x4040, 0, 0], 0x40c0),
        ("add.sat.f16 %ds, %as, %bs; // 16", [0x3c00, 0x4000, 0, 0], 0x3c00),
        ("add.ftz.f16 %ds, %as, %bs; // 16", [0x0001, 0x0001, 0, 0], 0),
        ("neg.f16 %ds, %as; // 16", [0x3c00, 0, 0, 0], 0xbc00),
        ("abs.bf16x2 %d, %a;", [0xbf80_c000, 0, 0, 0], 0x3f80_4000),
        ("max.f16x2 %d, %a, %b;", [0x3c00_7e00, 0x4000_3c00, 0, 0], 0x4000_3c00),
        ("max.NaN.bf16 %ds, %as, %bs; // 16", [0x3f80, 0x7fc0, 0, 0], 0x7fff),
        ("min.bf16 %ds, %as, %bs; // 16", [0x3f80, 0x7fc0, 0, 0], 0x3f80),
        ("ex2.approx.f16 %ds, %as; // 16", [0x4000, 0, 0, 0], 0x4400),
        ("tanh.approx.f16 %ds, %as; // 16", [0x7c00, 0, 0, 0], 0x3c00),
    ]);
}

#[test]
fn exchange_between_lanes() {
    let lanes: [[u64; 4]; 32] = std::array::from_fn(|l| [100 + l as u64, l as u64 % 3, u64::from(l < 5), 0]);
    let expect = |body: &str, want: &dyn Fn(usize) -> u64| {
        assert_eq!(run(body, &lanes).unwrap(), std::array::from_fn(want), "{body}");
    };
    expect("shfl.sync.bfly.b32 %d, %a, 1, 31, -1;", &|l| 100 + (l ^ 1) as u64);
    expect("shfl.sync.up.b32 %d, %a, 3, 0, -1;", &|l| 100 + if l < 3 { l } else { l - 3 } as u64);
    expect("shfl.sync.down.b32 %d, %a, 3, 31, -1;", &|l| 100 + if l > 28 { l } else { l + 3 } as u64);
    expect("shfl.sync.idx.b32 %d, %a, 7, 31, -1;", &|_| 107);
    // Segments of eight lanes: clamp 0x1f with segment mask 0x18.
    expect("shfl.sync.idx.b32 %d, %a, 2, 6175, -1;", &|l| 100 + (l / 8 * 8 + 2) as u64);
    expect("shfl.sync.down.b32 %d|%dp, %a, 4, 6151, -1; // p", &|l| u64::from(l % 8 < 4));
    expect("vote.sync.ballot.b32 %d, %cp, -1;", &|_| 31);
    expect("vote.sync.any.pred %dp, %cp, -1; // p", &|_| 1);
    expect("vote.sync.all.pred %dp, %cp, -1; // p", &|_| 0);
    expect("vote.sync.uni.pred %dp, !%cp, -1; // p", &|_| 0);
    expect("activemask.b32 %d;", &|_| M);
    expect("match.any.sync.b32 %d, %b, -1;", &|l| {
        (0..32).filter(|m| m % 3 == l % 3).map(|m| 1u64 << m).sum()
    });
    expect("match.all.sync.b32 %d|%dp, %b, -1; // p", &|_| 0);
    expect("redux.sync.add.u32 %d, %a, -1;", &|_| (0..32).map(|l| 100 + l).sum());
    expect("redux.sync.max.s32 %d, %a, -1;", &|_| 131);
    expect("redux.sync.min.u32 %d, %a, -1;", &|_| 100);
    expect("redux.sync.xor.b32 %d, %a, -1;", &|_| (100..132).fold(0, |x, y| x ^ y));
    expect("mov.u32 %d, %lanemask_lt;", &|l| (1 << l) - 1);
    expect("mov.u32 %d, %laneid;", &|l| l as u64);
}

#[test]
fn branches_by_table() {
    let body = "ways: .branchtargets one, two, three, one;\nbrx.idx %b, ways;\n\
        one: add.u32 %d, %a, 1; bra.uni done;\ntwo: add.u32 %d, %a, 20; bra.uni done;\nthree: add.u32 %d, %a, 300;\ndone:";
    let way = |b: u64| [1_u64, 20, 300, 1][b as usize];
    // All lanes one way, and lanes apart that meet again.
    for chosen in [&(|_| 1_u64) as &dyn Fn(u64) -> u64, &|lane| lane % 4, &|lane| u64::from(lane > 30)] {
        let lanes = std::array::from_fn(|lane| [7 * lane as u64, chosen(lane as u64), 0, 0]);
        let expected = std::array::from_fn(|lane| 7 * lane as u64 + way(chosen(lane as u64)));
        assert_eq!(run(body, &lanes).unwrap(), expected);
    }
    let past = run(body, &std::array::from_fn(|lane| [0, u64::from(lane == 5) * 4, 0, 0])).unwrap_err();
    assert!(past.contains("brx.idx past the end of its list"), "{past}");
    let unknown = run("brx.idx %b, nowhere;", &[[0; 4]; 32]).unwrap_err();
    assert!(unknown.contains("no .branchtargets `nowhere`"), "{unknown}");
}

#[test]
fn hints_change_nothing() {
    for hint in [
        "nanosleep.u32 100;",
        "nanosleep.u32 %b;",
        "prefetch.global.L1 [%i];",
        "prefetch.global.L2 [%i+64];",
        "prefetch.L2 [%i];",
        // An address that nobody has: a prefetch never faults.
        "prefetch.global.L2 [%bl];",
        "griddepcontrol.wait;",
        "griddepcontrol.launch_dependents;",
    ] {
        let lanes: [[u64; 4]; 32] = std::array::from_fn(|lane| [100 + lane as u64, 40, 0, 0]);
        let expected = std::array::from_fn(|lane| 100 + lane as u64);
        assert_eq!(run(&format!("{hint} mov.u32 %d, %a;"), &lanes), Ok(expected), "{hint}");
    }
}

#[test]
fn every_half_converts_exactly() {
    use half::{bf16, f16};
    use virtual_gpu::num;
    for bits in 0..=u16::MAX {
        let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
        let (x, y) = (num::f16_to_f32(bits), num::bf16_to_f32(bits));
        assert!(x.to_bits() == h.to_f32().to_bits() || h.is_nan() && x.is_nan(), "{bits:#x}");
        assert!(y.to_bits() == b.to_f32().to_bits() || b.is_nan() && y.is_nan(), "{bits:#x}");
        // Back again, and the neighbours in f32: just below, at and just above the middle between two halves.
        assert_eq!(num::f32_to_f16(x), if h.is_nan() { 0x7fff } else { bits });
        assert_eq!(num::f32_to_bf16(y), if b.is_nan() { 0x7fff } else { bits });
        for f in [x, y] {
            let next = if f == x {
                f16::from_bits(bits.wrapping_add(1)).to_f32()
            } else {
                f32::from_bits(f.to_bits().wrapping_add(0x10000))
            };
            let middle = ((f64::from(f) + f64::from(next)) / 2.0) as f32;
            for d in [-1i32, 0, 1] {
                let v = f32::from_bits(middle.to_bits().wrapping_add_signed(d));
                if v.is_nan() {
                    continue;
                }
                assert_eq!(num::f32_to_f16(v), f16::from_f32(v).to_bits(), "{v:e}");
                assert_eq!(num::f32_to_bf16(v), bf16::from_f32(v).to_bits(), "{v:e}");
                let exact = f64::from(v);
                assert_eq!(
                    num::narrow(exact, num::F16, num::Round::Nearest) as u16,
                    f16::from_f32(v).to_bits()
                );
                let (low, high) = (
                    num::narrow(exact, num::F16, num::Round::Down),
                    num::narrow(exact, num::F16, num::Round::Up),
                );
                let wide = |bits: u32| num::f16_to_f32(bits as u16);
                assert!(wide(low) <= v && v <= wide(high), "{v:e}");
                let zero = wide(num::narrow(exact, num::F16, num::Round::Zero));
                assert!(zero.abs() <= v.abs() && (zero == wide(low) || zero == wide(high)));
            }
        }
    }
}

#[test]
fn unknown_instructions_and_modifiers_are_refused_with_their_line() {
    let refuse = |body: &str| run(body, &[[0; 4]; 32]).unwrap_err();
    assert!(
        refuse("frobnicate.b32 %d, %a;").contains("line 22: `frobnicate.b32`"),
        "{}",
        refuse("frobnicate.b32 %d, %a;")
    );
    assert!(refuse("add.rn.s32 %d, %a, %b;").contains("unknown modifier .rn"));
    assert!(refuse("add.s32 %d, %al, %b;").contains("64-bit"));
    assert!(refuse("add.s32 %d, %a;").contains("operands"));
    assert!(refuse("ld.global.f32 %d, [nowhere];").contains("unknown symbol"));
    assert!(refuse("mma.sync.aligned.m16n8k15.row.col.f32.f16.f16.f32 {%d,%d,%d,%d}, {%a,%a,%a,%a}, {%a,%a}, {%d,%d,%d,%d};").contains("shape"));
    assert!(refuse("wgmma.fence.sync.aligned;").contains("unknown instruction"));
}
