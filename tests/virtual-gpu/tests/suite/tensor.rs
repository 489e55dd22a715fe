//! Tensor-core instructions against matrices multiplied plainly, with fragments laid out as in the PTX ISA.

use crate::common::{Test, data, gpu_with};
use cudarc::driver::{LaunchConfig, PushKernelArg};
use half::{bf16, f16};
use virtual_gpu::exec::Accumulate;

const WARP: LaunchConfig = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };

type ToBits = fn(f32) -> u16;
type ToValue = fn(u16) -> f64;

/// Runs one mma: `a`, `b`, `c` give each lane's registers; the lanes' results come back.
fn mma(form: &str, a: &[[u32; 32]], b: &[[u32; 32]], c: &[[u32; 32]], mode: Accumulate) -> Vec<[u32; 32]> {
    let (na, nb, nc) = (a.len(), b.len(), c.len());
    let registers = |prefix: &str, n: usize| {
        let all: Vec<String> = (0..n).map(|i| format!("%{prefix}{i}")).collect();
        format!("{{{}}}", all.join(", "))
    };
    let mut text = String::from(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out) {\n\
         .reg .b64 %i, %o; .reg .b32 %t, %a<4>, %b<2>, %c<4>, %d<4>;\n\
         ld.param.u64 %i, [in]; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x;\n\
         mad.wide.u32 %i, %t, 4, %i; mad.wide.u32 %o, %t, 4, %o;\n",
    );
    let names = (0..na)
        .map(|n| format!("a{n}"))
        .chain((0..nb).map(|n| format!("b{n}")))
        .chain((0..nc).map(|n| format!("c{n}")));
    for (n, name) in names.enumerate() {
        text += &format!("ld.global.b32 %{name}, [%i+{}];\n", n * 128);
    }
    text += &format!(
        "mma.sync.aligned.{form} {}, {}, {}, {};\n",
        registers("d", nc),
        registers("a", na),
        registers("b", nb),
        registers("c", nc)
    );
    for n in 0..nc {
        text += &format!("st.global.b32 [%o+{}], %d{n};\n", n * 128);
    }
    text += "ret;\n}\n";
    let t = gpu_with("a100", &text);
    t.gpu.accumulate(mode);
    let flat: Vec<u32> = [a, b, c].concat().concat();
    let input = t.stream.clone_htod(&flat).unwrap();
    let mut output = t.stream.alloc_zeros::<u32>(nc * 32).unwrap();
    let f = t.kernel("k");
    let mut l = t.stream.launch_builder(&f);
    l.arg(&input).arg(&mut output);
    unsafe { l.launch(WARP) }.unwrap();
    let out = t.stream.clone_dtoh(&output).unwrap();
    t.clean();
    out.chunks(32).map(|c| c.try_into().unwrap()).collect()
}

/// Packs a matrix into registers: `index(lane, register, part)` gives row and column.
fn pack(
    registers: usize,
    parts: usize,
    bits: u32,
    at: impl Fn(usize, usize, usize) -> u32,
) -> Vec<[u32; 32]> {
    let one = |lane: usize, r: usize| (0..parts).map(|p| at(lane, r, p) << (bits * p as u32)).sum();
    (0..registers).map(|r| std::array::from_fn(|lane| one(lane, r))).collect()
}

/// Where the elements of D lie: lane and element to row and column.
fn d_place(lane: usize, e: usize) -> (usize, usize) {
    (lane / 4 + 8 * (e / 2), lane % 4 * 2 + e % 2)
}

fn halves(form: &str, k: usize, to_bits: ToBits, to_f64: ToValue, mode: Accumulate, tolerance: f64) {
    let (a, b, c) = (data(1, 16 * k), data(2, k * 8), data(3, 128));
    let (abits, bbits): (Vec<u16>, Vec<u16>) =
        (a.iter().map(|&x| to_bits(x)).collect(), b.iter().map(|&x| to_bits(x)).collect());
    let ra = pack(k / 4, 2, 16, |lane, r, p| {
        let (row, column) = (lane / 4 + 8 * (r % 2), lane % 4 * 2 + p + 8 * (r / 2));
        u32::from(abits[row * k + column])
    });
    let rb = pack(k / 8, 2, 16, |lane, r, p| u32::from(bbits[(lane % 4 * 2 + p + 8 * r) * 8 + lane / 4]));
    let rc = pack(4, 1, 32, |lane, e, _| {
        let (row, column) = d_place(lane, e);
        c[row * 8 + column].to_bits()
    });
    let d = mma(form, &ra, &rb, &rc, mode);
    for lane in 0..32 {
        for e in 0..4 {
            let (row, column) = d_place(lane, e);
            let dot: f64 = (0..k).map(|i| to_f64(abits[row * k + i]) * to_f64(bbits[i * 8 + column])).sum();
            let want = dot + f64::from(c[row * 8 + column]);
            let got = f64::from(f32::from_bits(d[e][lane]));
            assert!((got - want).abs() <= tolerance, "{form} ({row},{column}): {got} for {want}");
        }
    }
}

#[test]
fn f16_and_bf16_with_f32_sums() {
    let (f, g): (ToBits, ToValue) = (|x| f16::from_f32(x).to_bits(), |b| f16::from_bits(b).to_f64());
    let (p, q): (ToBits, ToValue) = (|x| bf16::from_f32(x).to_bits(), |b| bf16::from_bits(b).to_f64());
    // Sums stay below 16, whose last place is 2^-20: exact rounds once, cutting loses a whole place, a chain of 16
    // f32 sums half a place each.
    for (mode, tolerance) in [
        (Accumulate::Exact, 0.5 / f64::from(1 << 20)),
        (Accumulate::Truncating, 1.0 / f64::from(1 << 20)),
        (Accumulate::Sequential, 8.0 / f64::from(1 << 20)),
    ] {
        halves("m16n8k16.row.col.f32.f16.f16.f32", 16, f, g, mode, tolerance);
        halves("m16n8k8.row.col.f32.f16.f16.f32", 8, f, g, mode, tolerance);
        halves("m16n8k16.row.col.f32.bf16.bf16.f32", 16, p, q, mode, tolerance);
        halves("m16n8k8.row.col.f32.bf16.bf16.f32", 8, p, q, mode, tolerance);
    }
}

#[test]
fn f16_sums() {
    let (a, b) = (data(4, 256), data(5, 128));
    let bits = |x: f32| u32::from(f16::from_f32(x).to_bits());
    let exact = |x: f32| f16::from_f32(x).to_f64();
    let ra = pack(4, 2, 16, |l, r, p| bits(a[(l / 4 + 8 * (r % 2)) * 16 + l % 4 * 2 + p + 8 * (r / 2)]));
    let rb = pack(2, 2, 16, |l, r, p| bits(b[(l % 4 * 2 + p + 8 * r) * 8 + l / 4]));
    let rc = pack(2, 2, 16, |_, _, _| bits(1.0));
    let d = mma("m16n8k16.row.col.f16.f16.f16.f16", &ra, &rb, &rc, Accumulate::Exact);
    for lane in 0..32 {
        for e in 0..4 {
            let (row, column) = d_place(lane, e);
            let dot: f64 = (0..16).map(|i| exact(a[row * 16 + i]) * exact(b[i * 8 + column])).sum();
            let got = f16::from_bits((d[e / 2][lane] >> (16 * (e % 2))) as u16);
            // Rounded to f32 and then to f16: twice, so a tie may fall either way.
            assert!(
                (got.to_f64() - (dot + 1.0)).abs() <= 0.000_981 * (dot + 1.0).abs().max(1.0),
                "{got} {dot}"
            );
        }
    }
}

#[test]
fn tf32() {
    let (a, b) = (data(6, 128), data(7, 64));
    let cut = |x: f32| f64::from(f32::from_bits(x.to_bits() & !0x1fff));
    let ra = pack(4, 1, 32, |l, r, _| a[(l / 4 + 8 * (r % 2)) * 8 + l % 4 + 4 * (r / 2)].to_bits());
    let rb = pack(2, 1, 32, |l, r, _| b[(l % 4 + 4 * r) * 8 + l / 4].to_bits());
    let d = mma("m16n8k8.row.col.f32.tf32.tf32.f32", &ra, &rb, &[[0; 32]; 4], Accumulate::Exact);
    for lane in 0..32 {
        for e in 0..4 {
            let (row, column) = d_place(lane, e);
            let want: f64 = (0..8).map(|i| cut(a[row * 8 + i]) * cut(b[i * 8 + column])).sum();
            assert_eq!(d[e][lane], (want as f32).to_bits());
        }
    }
}

#[test]
fn bytes() {
    for (form, k, unsigned) in [
        ("m16n8k32.row.col.s32.s8.s8.s32", 32, false),
        ("m16n8k16.row.col.s32.s8.s8.s32", 16, false),
        ("m16n8k32.row.col.s32.u8.s8.s32", 32, true),
        ("m16n8k32.row.col.satfinite.s32.s8.s8.s32", 32, false),
    ] {
        let bytes = |seed, n| data(seed, n).iter().map(|v| (v * 128.0) as i8).collect::<Vec<i8>>();
        let (a, b) = (bytes(8, 16 * k), bytes(9, 8 * k));
        let start = if form.contains("sat") { i32::MAX - 10 } else { i32::MAX };
        let ra = pack(k / 8, 4, 8, |l, r, p| {
            u32::from(a[(l / 4 + 8 * (r % 2)) * k + l % 4 * 4 + p + 16 * (r / 2)] as u8)
        });
        let rb = pack(k / 16, 4, 8, |l, r, p| u32::from(b[(l % 4 * 4 + p + 16 * r) * 8 + l / 4] as u8));
        let d = mma(form, &ra, &rb, &[[start as u32; 32]; 4], Accumulate::Exact);
        for lane in 0..32 {
            for e in 0..4 {
                let (row, column) = d_place(lane, e);
                let left = |i: usize| {
                    let x = a[row * k + i];
                    if unsigned { i64::from(x as u8) } else { i64::from(x) }
                };
                let dot: i64 = (0..k).map(|i| left(i) * i64::from(b[i * 8 + column])).sum();
                let sum = dot + i64::from(start);
                let want = if form.contains("sat") {
                    sum.clamp(i32::MIN.into(), i32::MAX.into()) as i32
                } else {
                    sum as i32
                };
                assert_eq!(d[e][lane] as i32, want, "{form}");
            }
        }
    }
}

/// Runs `k`, whose lanes write four words each, without a report.
fn four_words_a_lane(t: &Test) -> Vec<u32> {
    let mut out = t.stream.alloc_zeros::<u32>(128).unwrap();
    let f = t.kernel("k");
    let mut l = t.stream.launch_builder(&f);
    l.arg(&mut out);
    unsafe { l.launch(WARP) }.unwrap();
    let words = t.stream.clone_dtoh(&out).unwrap();
    t.clean();
    words
}

#[test]
fn matrices_load_straight_and_transposed() {
    for (transposed, name) in [(false, ""), (true, ".trans")] {
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 out) {{\n\
             .shared .align 16 .b8 tile[512]; .reg .b64 %o; .reg .b32 %t, %s, %v, %w, %r<4>;\n\
             ld.param.u64 %o, [out]; mov.u32 %t, %tid.x; mad.wide.u32 %o, %t, 16, %o;\n\
             mov.u32 %s, tile; mad.lo.u32 %s, %t, 16, %s; shl.b32 %v, %t, 3;\n\
             // element n of the four matrices is n\n\
             mad.lo.u32 %r0, %v, 0x10001, 0x10000; add.u32 %r1, %r0, 0x20002; add.u32 %r2, %r0, 0x40004;\n\
             add.u32 %r3, %r0, 0x60006; st.shared.v4.b32 [%s], {{%r0, %r1, %r2, %r3}};\nbar.sync 0;\n\
             ldmatrix.sync.aligned.m8n8.x4{name}.shared.b16 {{%r0, %r1, %r2, %r3}}, [%s];\n\
             st.global.v4.b32 [%o], {{%r0, %r1, %r2, %r3}}; ret;\n}}\n"
        );
        let t = gpu_with("a100", &text);
        let got = four_words_a_lane(&t);
        for lane in 0..32u32 {
            for matrix in 0..4u32 {
                let element = |n: u32| {
                    let (row, column) = (lane / 4, lane % 4 * 2 + n);
                    matrix * 64 + if transposed { column * 8 + row } else { row * 8 + column }
                };
                assert_eq!(got[(lane * 4 + matrix) as usize], element(0) | element(1) << 16);
            }
        }
        let c = t.gpu.launches()[0].counters;
        assert_eq!((c.shared_requests, c.shared_waves), (2, 8));
    }
}

#[test]
fn matrices_are_stored_straight_and_transposed() {
    for (transposed, name) in [(false, ""), (true, ".trans")] {
        let text = format!(
            ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 out) {{\n\
             .shared .align 16 .b8 tile[512]; .reg .b64 %o; .reg .b32 %t, %s, %v, %r<4>;\n\
             ld.param.u64 %o, [out]; mov.u32 %t, %tid.x; mad.wide.u32 %o, %t, 16, %o;\n\
             mov.u32 %s, tile; mad.lo.u32 %s, %t, 16, %s; shl.b32 %v, %t, 1;\n\
             // the elements of a lane are those of 8 · row + column: 2 · lane and the next one\n\
             mad.lo.u32 %r0, %v, 0x10001, 0x10000; add.u32 %r1, %r0, 0x400040; add.u32 %r2, %r0, 0x800080;\n\
             add.u32 %r3, %r0, 0xc000c0;\n\
             stmatrix.sync.aligned.m8n8.x4{name}.shared.b16 [%s], {{%r0, %r1, %r2, %r3}};\nbar.sync 0;\n\
             ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%s];\n\
             st.global.v4.b32 [%o], {{%r0, %r1, %r2, %r3}}; ret;\n}}\n"
        );
        let got = four_words_a_lane(&gpu_with("h100", &text));
        // The address of a row is that of the lane of its number.
        for lane in 0..32u32 {
            for word in 0..4u32 {
                let element = |n: u32| {
                    let (matrix, row, column) = (lane / 8, lane % 8, 2 * word + n);
                    matrix * 64 + if transposed { column * 8 + row } else { row * 8 + column }
                };
                assert_eq!(got[(lane * 4 + word) as usize], element(0) | element(1) << 16);
            }
        }
    }
}
