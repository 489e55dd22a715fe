//! Tensor cores: `ldmatrix`, `stmatrix`, `mma.sync`. Fragments are laid out as in the PTX ISA, section 9.7.15;
//! below, `g` is lane / 4 and `t` is lane % 4.

use super::access::{check_window, read_shared, write_shared};
use super::address::lanes;
use super::traffic::part_waves;
use super::{Accumulate, Machine};
use crate::memory::SHARED_WINDOW;
use crate::num::{F32, Half, Round, canon, narrow};
use crate::program::{Flow, Inst};
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

fn value(element: Element, register: u32, n: u32) -> f32 {
    match element {
        Element::F16 => Half::F16.widen((register >> (16 * n)) as u16),
        Element::Bf16 => Half::Bf16.widen((register >> (16 * n)) as u16),
        Element::Tf32 => f32::from_bits(register & !0x1fff),
        Element::S8 => f32::from((register >> (8 * n)) as i8),
        Element::U8 => f32::from((register >> (8 * n)) as u8),
    }
}

/// Factors of one product, widened: A by rows, B by rows of k.
struct Factors {
    a: [[f32; 32]; 16],
    b: [[f32; 8]; 32],
}

unsafe fn gather(m: &Machine, shape: Shape, registers: &[u32]) -> Factors {
    let mut f = Factors { a: [[0.0; 32]; 16], b: [[0.0; 8]; 32] };
    let per = shape.per_register();
    // Register r of A holds rows g + 8 (r odd), columns t * per … + half of k (r >= 2).
    let (of_a, rest) = registers.split_at(shape.a_registers());
    for (r, &register) in of_a.iter().enumerate() {
        // SAFETY: slots come from the decoder.
        let slot = unsafe { &*m.slot(register).cast::<[u32; 32]>() };
        for (lane, &word) in slot.iter().enumerate() {
            let (g, t) = (lane / 4, lane as u32 % 4);
            let row = g + 8 * (r & 1);
            let first = t * per + 4 * per * (r as u32 >> 1);
            for n in 0..per {
                f.a[row][(first + n) as usize] = value(shape.a, word, n);
            }
        }
    }
    for (r, &register) in rest[..shape.b_registers()].iter().enumerate() {
        // SAFETY: as above.
        let slot = unsafe { &*m.slot(register).cast::<[u32; 32]>() };
        for (lane, &word) in slot.iter().enumerate() {
            let (g, t) = (lane / 4, lane as u32 % 4);
            let first = t * per + 4 * per * r as u32;
            for n in 0..per {
                f.b[(first + n) as usize][g] = value(shape.b, word, n);
            }
        }
    }
    f
}

#[inline(always)]
fn sums_exact(f: &Factors, k: usize, c: &mut [[f64; 8]; 16]) {
    for (row, sums) in f.a.iter().zip(c.iter_mut()) {
        for (&x, b) in row[..k].iter().zip(&f.b) {
            for n in 0..8 {
                sums[n] += f64::from(x) * f64::from(b[n]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn sums_exact_fast(f: &Factors, k: usize, c: &mut [[f64; 8]; 16]) {
    sums_exact(f, k, c);
}

fn sums(f: &Factors, k: usize, c: &mut [[f64; 8]; 16], mode: Accumulate) {
    if mode == Accumulate::Sequential {
        for (row, sums) in f.a.iter().zip(c.iter_mut()) {
            for (&x, b) in row[..k].iter().zip(&f.b) {
                for n in 0..8 {
                    sums[n] = f64::from((sums[n] + f64::from(x) * f64::from(b[n])) as f32);
                }
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if super::lanes::has_avx2() {
        // SAFETY: the features were found.
        return unsafe { sums_exact_fast(f, k, c) };
    }
    sums_exact(f, k, c);
}

/// `mma.sync`: the list holds D, A, B, C; `imm` the [`Shape`].
///
/// # Safety
/// See [`crate::program::Handler`]; so for all handlers here.
pub unsafe fn multiply(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let shape = Shape::unpack(i.imm);
    require_all(m, i, mask);
    let kernel = std::sync::Arc::clone(&m.kernel);
    let list = &kernel.lists[i.ext as usize];
    let (d, rest) = list.split_at(shape.c_registers());
    let c_slots = &rest[shape.a_registers() + shape.b_registers()..];
    let integer = matches!(shape.a, Element::S8 | Element::U8);
    // SAFETY: slots come from the decoder.
    unsafe {
        let factors = gather(m, shape, rest);
        let mut c = [[0.0f64; 8]; 16];
        for_each_sum(shape, |register, part, row, column, lane| {
            let word = *m.slot(c_slots[register]).add(lane);
            c[row][column] = match (integer, shape.half_sums) {
                (true, _) => f64::from(word as i32),
                (_, true) => f64::from(Half::F16.widen((word >> (16 * part)) as u16)),
                _ => f64::from(f32::from_bits(word)),
            };
        });
        // Bytes and their sums are exact in f64 in any order.
        let mode = if integer { Accumulate::Exact } else { m.settings.accumulate };
        sums(&factors, shape.k as usize, &mut c, mode);
        for_each_sum(shape, |register, part, row, column, lane| {
            let slot = m.slot(d[register]).add(lane);
            let sum = c[row][column];
            if integer {
                let limited = if shape.saturate { sum.clamp(-2147483648.0, 2147483647.0) } else { sum };
                *slot = limited as i64 as u32;
            } else if shape.half_sums {
                let bits = u32::from(Half::F16.nearest(sum as f32));
                *slot = (*slot & !(0xffff << (16 * part))) | bits << (16 * part);
            } else if mode == Accumulate::Truncating {
                *slot = canon(f32::from_bits(narrow(sum, F32, Round::Zero))).to_bits();
            } else {
                *slot = canon(sum as f32).to_bits();
            }
        });
    }
    m.counters.tensor_instructions += 1;
    m.counters.tensor_multiply_adds += 16 * 8 * u64::from(shape.k);
    Flow::Next
}

/// Calls `f(register, half of it, row, column, lane)` for every element of C.
#[inline(always)]
fn for_each_sum(shape: Shape, mut f: impl FnMut(usize, u32, usize, usize, usize)) {
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for e in 0..4usize {
            let (row, column) = (g + 8 * (e / 2), t * 2 + e % 2);
            let (register, part) = if shape.half_sums { (e / 2, e as u32 % 2) } else { (e, 0) };
            f(register, part, row, column, lane);
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
unsafe fn rows(m: &mut Machine, i: &Inst, mask: u32, count: usize, verb: &str) -> Result<[u64; 32], Flow> {
    // SAFETY: the slot comes from the decoder, which knows its width.
    let mut at = unsafe { super::address::addresses(m, i.a, i.c & 1 != 0, i.imm) };
    for address in &mut at {
        if *address >> 56 == SHARED_WINDOW >> 56 {
            *address -= SHARED_WINDOW;
        }
    }
    require_all(m, i, mask);
    let used = if count == 4 { u32::MAX } else { (1u32 << (8 * count)) - 1 };
    check_window(m, i, Space::Shared, &at, mask & used, 16, verb)?;
    if m.settings.options.traffic {
        let offsets: [u32; 32] = std::array::from_fn(|l| at[l] as u32);
        m.counters.shared_requests += 1;
        for matrix in 0..count {
            m.counters.shared_waves += part_waves(&offsets[matrix * 8..matrix * 8 + 8], 0xff, 16);
            m.counters.shared_ideal_waves += 1;
        }
    }
    Ok(at)
}

/// `ldmatrix`: `a` the address (64-bit if `c` bit 0), the list the destinations, `c` bit 1 transposes.
pub unsafe fn load_matrix(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel = std::sync::Arc::clone(&m.kernel);
    let list = &kernel.lists[i.ext as usize];
    // SAFETY: slots come from the decoder.
    unsafe {
        let at = match rows(m, i, mask, list.len(), "ldmatrix") {
            Ok(at) => at,
            Err(flow) => return flow,
        };
        for (matrix, &dst) in list.iter().enumerate() {
            let mut tile = [[0u16; 8]; 8];
            for (r, row) in tile.iter_mut().enumerate() {
                let lane = matrix * 8 + r;
                let bytes = read_shared(m, i, lane, at[lane] as usize, 16);
                for (c, element) in row.iter_mut().enumerate() {
                    *element = u16::from_le_bytes([bytes[2 * c], bytes[2 * c + 1]]);
                }
            }
            let dst = m.slot(dst);
            for lane in lanes(mask) {
                let (g, t) = (lane / 4, lane % 4);
                let (low, high) = if i.c & 2 != 0 {
                    (tile[2 * t][g], tile[2 * t + 1][g])
                } else {
                    (tile[g][2 * t], tile[g][2 * t + 1])
                };
                *dst.add(lane) = u32::from(low) | u32::from(high) << 16;
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
        let at = match rows(m, i, mask, list.len(), "stmatrix") {
            Ok(at) => at,
            Err(flow) => return flow,
        };
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
