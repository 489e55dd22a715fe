//! Tensor cores: `ldmatrix`, `stmatrix`, `mma.sync`. Fragments are laid out as in the PTX ISA, section 9.7.15;
//! below, `g` is lane / 4 and `t` is lane % 4.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::address::{Request, lanes};
use super::lanes::{choose, handler};
use super::traffic::waves_of;
use super::window::{check, note_read, write_shared};
use super::{Accumulate, Machine};
use crate::num::{F32, Half, Round, canon, narrow};
use crate::program::{Flow, Handler, Inst, Kernel};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;

/// Element type of the factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// f16.
    F16,
    /// bf16.
    Bf16,
    /// tf32: an f32 whose low 13 bits are ignored.
    Tf32,
    /// Signed bytes.
    S8,
    /// Unsigned bytes.
    U8,
}

/// A shape and its types, packed in `Inst::imm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Depth of the product.
    pub k: u32,
    /// Type of A.
    pub a: Element,
    /// Type of B.
    pub b: Element,
    /// Whether the sums are f16 (else f32, or s32 for bytes).
    pub half_sums: bool,
    /// Whether integer sums saturate.
    pub saturate: bool,
}

const ELEMENTS: [Element; 5] = [Element::F16, Element::Bf16, Element::Tf32, Element::S8, Element::U8];

impl Shape {
    /// As an immediate.
    pub fn pack(self) -> i64 {
        let number = |e: Element| ELEMENTS.iter().position(|&x| x == e).unwrap_or(0) as i64;
        i64::from(self.k)
            | number(self.a) << 8
            | number(self.b) << 12
            | i64::from(self.half_sums) << 16
            | i64::from(self.saturate) << 17
    }

    fn unpack(imm: i64) -> Self {
        Shape {
            k: (imm & 0xff) as u32,
            a: ELEMENTS[(imm >> 8 & 7) as usize],
            b: ELEMENTS[(imm >> 12 & 7) as usize],
            half_sums: imm >> 16 & 1 == 1,
            saturate: imm >> 17 & 1 == 1,
        }
    }

    /// Whether it works on bytes, with sums in s32.
    fn integer(self) -> bool {
        matches!(self.a, Element::S8 | Element::U8)
    }

    /// Elements of a 32-bit register.
    pub fn per_register(self) -> u32 {
        match self.a {
            Element::F16 | Element::Bf16 => 2,
            Element::Tf32 => 1,
            Element::S8 | Element::U8 => 4,
        }
    }

    /// Registers of A.
    pub fn a_registers(self) -> usize {
        (16 * self.k / 32 / self.per_register()) as usize
    }

    /// Registers of B.
    pub fn b_registers(self) -> usize {
        (8 * self.k / 32 / self.per_register()) as usize
    }

    /// Registers of C and D.
    pub fn c_registers(self) -> usize {
        if self.half_sums { 2 } else { 4 }
    }
}

/// Factors of one product, widened: A by rows, B by rows of k.
struct Factors<const K: usize> {
    a: [[f64; K]; 16],
    b: [[f64; 8]; K],
}

/// Both factors of depth `K`, of elements `E`. A register holds eight rows of 16 bytes, four lanes a row. Register r
/// of A has the rows from 8 (r odd) on, and of each the 16 bytes r / 2; register r of B the 16 bytes r of each column.
#[inline(always)]
unsafe fn factors<E: Copy, const K: usize>(
    m: &Machine,
    shape: Shape,
    registers: &[u32],
    (widen_a, widen_b): (impl Fn(E) -> f32, impl Fn(E) -> f32),
) -> Factors<K> {
    let side = 16 / size_of::<E>();
    let (of_a, rest) = registers.split_at(shape.a_registers());
    // SAFETY: slots come from the decoder; each has 128 bytes, and the arithmetic below stays inside.
    unsafe {
        let slot = |register: Option<&u32>| m.slot(register.copied().unwrap_or(0)).cast::<E>().cast_const();
        let a: [*const E; 4] = std::array::from_fn(|r| slot(of_a.get(r)));
        let b: [*const E; 2] = std::array::from_fn(|r| slot(rest.get(r)));
        // Loops and not `from_fn`, which would be compiled for the baseline.
        let mut f = Factors { a: [[0.0; K]; 16], b: [[0.0; 8]; K] };
        for k in 0..K {
            for row in 0..16 {
                let at = a[2 * (k / side) + row / 8].add(row % 8 * side + k % side);
                f.a[row][k] = f64::from(widen_a(*at));
            }
            for column in 0..8 {
                f.b[k][column] = f64::from(widen_b(*b[k / side].add(column * side + k % side)));
            }
        }
        f
    }
}

/// Adds the products to `c`, k by k. Factors have so few bits that each product is exact in f64: adding it is one
/// rounding, whether `FUSED` or not.
#[inline(always)]
fn sums_exact<const K: usize, const FUSED: bool>(f: &Factors<K>, c: &mut [[f64; 8]; 16]) {
    // Four rows at once: enough sums that do not wait for one another.
    for (rows, sums) in f.a.chunks_exact(4).zip(c.chunks_exact_mut(4)) {
        let mut all = [sums[0], sums[1], sums[2], sums[3]];
        for (k, b) in f.b.iter().enumerate() {
            for (row, sums) in rows.iter().zip(&mut all) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = if FUSED { row[k].mul_add(b, *sum) } else { *sum + row[k] * b };
                }
            }
        }
        sums.copy_from_slice(&all);
    }
}

/// The same in f32, one rounding for each product.
fn sums_sequential<const K: usize>(f: &Factors<K>, c: &mut [[f64; 8]; 16]) {
    for (row, sums) in f.a.iter().zip(c.iter_mut()) {
        for (&x, b) in row.iter().zip(&f.b) {
            for n in 0..8 {
                sums[n] = f64::from((sums[n] + x * b[n]) as f32);
            }
        }
    }
}

/// `mma.sync` of a shape: the list holds D, A, B, C; `imm` the [`Shape`].
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "one handler for all shapes"))]
pub fn multiply(shape: Shape) -> Handler {
    #[cfg(target_arch = "x86_64")]
    if let Some(handler) = avx512::multiply(shape).or_else(|| avx2::multiply(shape)) {
        return handler;
    }
    multiply_any()
}

// Element types by number, for functions compiled for each.
#[cfg(target_arch = "x86_64")]
const F16: u8 = 0;
#[cfg(target_arch = "x86_64")]
const BF16: u8 = 1;
#[cfg(target_arch = "x86_64")]
const TF32: u8 = 2;

/// The handler for all shapes.
fn multiply_any() -> Handler {
    unsafe fn base(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
        // SAFETY: the caller's promise.
        unsafe { multiply_body::<false>(m, i, mask) }
    }
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt"))]
    unsafe fn fast(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
        // SAFETY: the caller's promise.
        unsafe { multiply_body::<true>(m, i, mask) }
    }
    choose(base, fast)
}

#[inline(always)]
unsafe fn multiply_body<const FUSED: bool>(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let shape = Shape::unpack(i.imm);
    require_all(m, i, mask);
    let kernel: *const Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive; slots come from the decoder.
    unsafe {
        let list = &(&(*kernel).lists)[i.ext as usize];
        let (d, rest) = list.split_at(shape.c_registers());
        let mut c = load_sums(m, shape, &rest[shape.a_registers() + shape.b_registers()..]);
        macro_rules! with {
            ($k:literal, $element:ty, $a:expr, $b:expr) => {
                accumulate::<$k, FUSED>(m, shape, &factors::<$element, $k>(m, shape, rest, ($a, $b)), &mut c)
            };
        }
        let f16 = |x: u16| Half::F16.widen(x);
        let bf16 = |x: u16| Half::Bf16.widen(x);
        let tf32 = |x: u32| f32::from_bits(x & !0x1fff);
        let byte =
            |of: Element| move |x: u8| if of == Element::S8 { f32::from(x as i8) } else { f32::from(x) };
        match (shape.a, shape.k) {
            (Element::F16, 8) => with!(8, u16, f16, f16),
            (Element::F16, _) => with!(16, u16, f16, f16),
            (Element::Bf16, 8) => with!(8, u16, bf16, bf16),
            (Element::Bf16, _) => with!(16, u16, bf16, bf16),
            (Element::Tf32, 4) => with!(4, u32, tf32, tf32),
            (Element::Tf32, _) => with!(8, u32, tf32, tf32),
            (a, 16) => with!(16, u8, byte(a), byte(shape.b)),
            (a, _) => with!(32, u8, byte(a), byte(shape.b)),
        }
        store_sums(m, shape, d, &c);
    }
    count_product(m, shape.k);
    Flow::Next
}

/// Counts a product of depth `k`.
#[inline(always)]
fn count_product(m: &mut Machine, k: u32) {
    m.counters.tensor_instructions += 1;
    m.counters.tensor_multiply_adds += 16 * 8 * u64::from(k);
}

#[inline(always)]
fn accumulate<const K: usize, const FUSED: bool>(
    m: &Machine,
    shape: Shape,
    factors: &Factors<K>,
    c: &mut [[f64; 8]; 16],
) {
    // Bytes and their sums are exact in f64 in any order.
    if m.settings.accumulate == Accumulate::Sequential && !shape.integer() {
        sums_sequential(factors, c);
    } else {
        sums_exact::<K, FUSED>(factors, c);
    }
}

/// C of a product. Registers 2h and 2h + 1 hold the rows from 8h on, the even and the odd columns; sums in f16 lie in
/// register h, both in a word.
#[inline(always)]
unsafe fn load_sums(m: &Machine, shape: Shape, registers: &[u32]) -> [[f64; 8]; 16] {
    // SAFETY: slots come from the decoder, and have 128 bytes.
    unsafe {
        let mut c = [[0.0; 8]; 16];
        macro_rules! all {
            (|$word:ident| $widen:expr) => {
                for (r, &register) in registers.iter().enumerate() {
                    let words = &*m.slot(register).cast::<[u32; 32]>();
                    for g in 0..8 {
                        for t in 0..4 {
                            let $word = words[4 * g + t];
                            c[r / 2 * 8 + g][2 * t + r % 2] = $widen;
                        }
                    }
                }
            };
        }
        if shape.half_sums {
            for (h, &register) in registers.iter().enumerate() {
                let rows = &*m.slot(register).cast::<[[u16; 8]; 8]>();
                for (row, halves) in c[8 * h..].iter_mut().zip(rows) {
                    row.iter_mut().zip(halves).for_each(|(x, &half)| *x = f64::from(Half::F16.widen(half)));
                }
            }
        } else if shape.integer() {
            all!(|word| f64::from(word as i32));
        } else {
            all!(|word| f64::from(f32::from_bits(word)));
        }
        c
    }
}

/// D of a product, from its sums.
#[inline(always)]
unsafe fn store_sums(m: &Machine, shape: Shape, registers: &[u32], c: &[[f64; 8]; 16]) {
    // SAFETY: slots come from the decoder, and have 128 bytes.
    unsafe {
        if shape.half_sums {
            for (h, &register) in registers.iter().enumerate() {
                let rows = &mut *m.slot(register).cast::<[[u16; 8]; 8]>();
                for (row, halves) in c[8 * h..].iter().zip(rows) {
                    row.iter().zip(halves).for_each(|(&sum, half)| *half = Half::F16.nearest(sum as f32));
                }
            }
            return;
        }
        macro_rules! all {
            (|$sum:ident| $narrow:expr) => {
                for (r, &register) in registers.iter().enumerate() {
                    let words = &mut *m.slot(register).cast::<[u32; 32]>();
                    for g in 0..8 {
                        for t in 0..4 {
                            let $sum = c[r / 2 * 8 + g][2 * t + r % 2];
                            words[4 * g + t] = $narrow;
                        }
                    }
                }
            };
        }
        if shape.integer() {
            all!(|sum| {
                let limited = if shape.saturate { sum.clamp(-2147483648.0, 2147483647.0) } else { sum };
                limited as i64 as u32
            });
        } else if m.settings.accumulate == Accumulate::Truncating {
            all!(|sum| canon(f32::from_bits(narrow(sum, F32, Round::Zero))).to_bits());
        } else {
            all!(|sum| canon(sum as f32).to_bits());
        }
    }
}

fn require_all(m: &mut Machine, i: &Inst, mask: u32) {
    if mask != u32::MAX && m.settings.options.masks {
        let text = format!("only lanes {mask:#010x} execute an instruction that needs the whole warp");
        m.report(Kind::ShuffleMask, i, mask.trailing_zeros(), text);
    }
}

/// Row addresses of `count` matrices, from the lanes that give them; checked and counted.
#[inline(always)]
unsafe fn rows(
    m: &mut Machine,
    i: &Inst,
    mask: u32,
    count: usize,
    verb: &str,
    request: &mut Request,
) -> Result<(), Flow> {
    require_all(m, i, mask);
    let used = if count == 4 { u32::MAX } else { (1u32 << (8 * count)) - 1 };
    request.mask = mask & used;
    // SAFETY: the slot comes from the decoder, which knows its width.
    unsafe { request.read_shared(m, (i.a, i.c & 1 != 0, i.imm)) };
    check(m, i, Space::Shared, request, verb)?;
    if m.settings.options.traffic {
        // Each matrix is a part of its own.
        let (waves, ideal) = waves_of(&request.at, used, 16, false);
        m.counters.shared_requests += 1;
        m.counters.shared_waves += waves;
        m.counters.shared_ideal_waves += ideal;
    }
    Ok(())
}

handler! {
    /// `ldmatrix`: `a` the address (64-bit if `c` bit 0), the list the destinations, `c` bit 1 transposes.
    load_matrix = load_matrix_body
}

#[inline(always)]
unsafe fn load_matrix_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel: *const Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive; slots come from the decoder.
    unsafe {
        let list = &(&(*kernel).lists)[i.ext as usize];
        let mut request = Request::blank(mask, 16);
        if let Err(flow) = rows(m, i, mask, list.len(), "ldmatrix", &mut request) {
            return flow;
        }
        if request.mask != 0 {
            note_read(m, i, &request);
        }
        for (matrix, &dst) in list.iter().enumerate() {
            let mut tile = [[0u32; 4]; 8];
            for (g, row) in tile.iter_mut().enumerate() {
                let at = request.at[matrix * 8 + g] as usize;
                // A lane that does not take part may give any address; that it does not is a finding already.
                if let Some(bytes) = m.block.shared.get(at..at.wrapping_add(16)) {
                    *row = bytes.as_ptr().cast::<[u32; 4]>().read_unaligned();
                }
            }
            let mut words = [0; 32];
            for (lane, word) in words.iter_mut().enumerate() {
                let (g, t) = (lane / 4, lane % 4);
                // Element `g` of row `n`, in the low bits.
                let half = |n: usize| tile[n][g / 2] >> (16 * (g & 1)) & 0xffff;
                *word = if i.c & 2 != 0 { half(2 * t) | half(2 * t + 1) << 16 } else { tile[g][t] };
            }
            let dst = m.slot(dst);
            if mask == u32::MAX {
                dst.cast::<[u32; 32]>().write(words);
            } else {
                lanes(mask).for_each(|lane| *dst.add(lane) = words[lane]);
            }
        }
    }
    Flow::Next
}

/// `stmatrix`: as [`load_matrix`], with sources in the list.
pub unsafe fn store_matrix(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel = std::sync::Arc::clone(&m.kernel);
    let list = &kernel.lists[i.ext as usize];
    // SAFETY: slots come from the decoder.
    unsafe {
        let mut request = Request::blank(mask, 16);
        if let Err(flow) = rows(m, i, mask, list.len(), "stmatrix", &mut request) {
            return flow;
        }
        let at = &request.at;
        for (matrix, &src) in list.iter().enumerate() {
            let words = *m.slot(src).cast::<[u32; 32]>();
            let mut tile = [[0u16; 8]; 8];
            for (lane, &word) in words.iter().enumerate() {
                let (g, t) = (lane / 4, lane % 4);
                for (n, half) in [word as u16, (word >> 16) as u16].into_iter().enumerate() {
                    if i.c & 2 != 0 {
                        tile[2 * t + n][g] = half;
                    } else {
                        tile[g][2 * t + n] = half;
                    }
                }
            }
            for (r, row) in tile.iter().enumerate() {
                let lane = matrix * 8 + r;
                let mut bytes = [0u8; 16];
                for (c, element) in row.iter().enumerate() {
                    bytes[2 * c..2 * c + 2].copy_from_slice(&element.to_le_bytes());
                }
                write_shared(m, i, lane, at[lane] as usize, &bytes);
            }
        }
    }
    Flow::Next
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::{avx2, avx512, multiply_any};
    use crate::counters::Class;
    use crate::exec::launch::run;
    use crate::exec::{Accumulate, Settings, Shape, draw};
    use crate::memory::{Memory, State};
    use crate::program::{Handler, Kernel};
    use crate::sanitizer::Options;
    use std::sync::Arc;

    /// One product by one warp: registers of A, B and C in, of D out, 128 bytes each. None if there is no handler.
    fn kernel(form: &str, handler: impl Fn(super::Shape) -> Option<Handler>) -> Option<Arc<Kernel>> {
        let mut text = String::from(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out) {\n\
             .reg .b64 %i, %o; .reg .b32 %t, %r<14>;\n\
             ld.param.u64 %i, [in]; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x;\n\
             mad.wide.u32 %i, %t, 4, %i; mad.wide.u32 %o, %t, 4, %o;\n",
        );
        (0..10).for_each(|n| text += &format!("ld.global.b32 %r{n}, [%i+{}];\n", n * 128));
        text += &format!(
            "mma.sync.aligned.{form} {{%r10, %r11, %r12, %r13}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, \
             {{%r6, %r7, %r8, %r9}};\n"
        );
        (0..4).for_each(|n| text += &format!("st.global.b32 [%o+{}], %r{};\n", n * 128, n + 10));
        text += "ret;\n}\n";
        let module = crate::ptx::parser::parse(&text).unwrap();
        let mut kernel = crate::decode::decode(&module, &Default::default()).unwrap().remove(0);
        let tensor = kernel.code.iter_mut().find(|inst| inst.class == Class::Tensor).unwrap();
        tensor.run = handler(super::Shape::unpack(tensor.imm))?;
        Some(Arc::new(kernel))
    }

    fn product(kernel: &Arc<Kernel>, registers: &[u32; 320], accumulate: Accumulate) -> Vec<u8> {
        let mut memory = Memory::new(1 << 20, 0);
        let bytes: Vec<u8> = registers.iter().flat_map(|word| word.to_le_bytes()).collect();
        let input = memory.allocate(1280, State::Live).unwrap();
        let output = memory.allocate(512, State::Live).unwrap();
        memory.at(input).unwrap().write(0, &bytes);
        let params = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
        let (grid, block) = ([1; 3], [32, 1, 1]);
        let shape = Shape { grid, block, dynamic_shared: 0, params, cooperative: false, number: 1 };
        let settings = Settings { options: Options::ALL, seed: 0, accumulate, budget: 1 << 20 };
        let outcome = run(kernel, shape, &mut memory, settings, 108, 108);
        assert_eq!((outcome.reports, outcome.counters.tensor_instructions), (vec![], 1));
        memory.at(output).unwrap().snapshot(0, 512).0
    }

    /// Bits of all kinds, of numbers that need many places, subnormals, infinities and NaN.
    #[test]
    fn products_are_those_of_the_plain_way() {
        let mut state = 1;
        for (form, bits, exponent) in [
            ("m16n8k16.row.col.f32.f16.f16.f32", 16, 5),
            ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, 8),
            ("m16n8k8.row.col.f32.tf32.tf32.f32", 32, 8),
        ] {
            let plain = kernel(form, |_| Some(multiply_any())).unwrap();
            let others = [kernel(form, avx2::multiply), kernel(form, avx512::multiply)];
            // A number whose exponent is below the largest by at most `spread`; anything every so often.
            let mut number = |bits: u32, exponent: u32, spread: u64, special: u64| {
                let x = draw(&mut state) as u32 >> (32 - bits);
                let field = (1 << exponent) - 1 << (bits - 1 - exponent);
                let low =
                    ((1 << (exponent - 1)) - (draw(&mut state) % spread) as u32) << (bits - 1 - exponent);
                if draw(&mut state).is_multiple_of(special) { x } else { x & !field | low & field }
            };
            for round in 0..400 {
                let (spread, special) =
                    ([1, 8, 1 << (exponent - 1)][round % 3], [1, 20, 1000, 1 << 40][round % 4]);
                let mut registers = [0; 320];
                for word in &mut registers[..192] {
                    *word = number(bits, exponent, spread, special);
                    if bits == 16 {
                        *word |= number(bits, exponent, spread, special) << 16;
                    }
                }
                registers[192..].iter_mut().for_each(|word| *word = number(32, 8, spread, special));
                for mode in [Accumulate::Exact, Accumulate::Truncating, Accumulate::Sequential] {
                    let want = product(&plain, &registers, mode);
                    for (n, other) in others.iter().enumerate().filter_map(|(n, k)| Some((n, k.as_ref()?))) {
                        let got = product(other, &registers, mode);
                        assert_eq!(got, want, "{form} {mode:?}, round {round}, handler {n}");
                    }
                }
            }
        }
    }
}
