//! Handlers that do the same to every lane. Each is compiled twice, for the baseline and for AVX2 with FMA, and
//! chosen once at load; those of memory also for AVX-512.

use super::Machine;
use super::address::lanes;
use crate::program::{Flow, Handler, Inst, NEGATED, SINK};

/// A value as it lies in a slot.
pub trait Lane: Copy {
    /// The slot's element.
    type Raw: Copy + Default;
    /// From the slot.
    fn from_raw(raw: Self::Raw) -> Self;
    /// To the slot.
    fn to_raw(self) -> Self::Raw;
}

macro_rules! lane {
    ($type:ty, $raw:ty, $from:expr, $to:expr) => {
        impl Lane for $type {
            type Raw = $raw;
            #[inline(always)]
            fn from_raw(raw: $raw) -> $type {
                $from(raw)
            }
            #[inline(always)]
            fn to_raw(self) -> $raw {
                $to(self)
            }
        }
    };
}

lane!(u32, u32, |x| x, |x| x);
lane!(i32, u32, |x| x as i32, |x| x as u32);
lane!(f32, u32, f32::from_bits, |x: f32| x.to_bits());
lane!(u16, u32, |x| x as u16, u32::from);
lane!(i16, u32, |x| x as i16, |x| u32::from(x as u16));
lane!(u64, u64, |x| x, |x| x);
lane!(i64, u64, |x| x as i64, |x| x as u64);
lane!(f64, u64, f64::from_bits, |x: f64| x.to_bits());

/// Whether the AVX2 versions can run here: they may use all that came with it, bit counts among them.
pub fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("avx2") && has!("fma") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether the AVX-512 versions can run here: they may use what AVX2 came with, too.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has_avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
}

/// The better of two versions of a handler.
pub fn choose(base: Handler, fast: Handler) -> Handler {
    if has_avx2() { fast } else { base }
}

/// Defines a function that gives the best of three compilations of a handler: with AVX-512 the 64-bit addresses and
/// stamps of a warp take half of the instructions.
macro_rules! handler {
    ($(#[$doc:meta])* $name:ident = $body:ident) => {
        $(#[$doc])*
        pub fn $name() -> crate::program::Handler {
            unsafe fn base(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
                // SAFETY: the caller's promise.
                unsafe { $body(m, i, mask) }
            }
            #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt"))]
            unsafe fn fast(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
                // SAFETY: the caller's promise.
                unsafe { $body(m, i, mask) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn widest(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
                // SAFETY: the caller's promise.
                unsafe { $body(m, i, mask) }
            }
            #[cfg(target_arch = "x86_64")]
            if crate::exec::lanes::has_avx512() {
                return widest;
            }
            crate::exec::lanes::choose(base, fast)
        }
    };
}
pub(crate) use handler;

/// The value of a function type that has no state.
#[inline(always)]
fn conjure<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0) };
    // SAFETY: the type has no bytes, and a value of it was passed to the function that made the handler.
    unsafe { std::mem::transmute_copy::<(), F>(&()) }
}

#[inline(always)]
unsafe fn take<T: Lane>(p: *const u32, chunk: usize) -> [T::Raw; 8] {
    // SAFETY: the slot has 32 elements of T::Raw.
    unsafe { *p.cast::<[T::Raw; 8]>().add(chunk) }
}

#[inline(always)]
unsafe fn put<T: Lane>(p: *mut u32, chunk: usize, mask: u32, value: [T::Raw; 8]) {
    // SAFETY: as above.
    unsafe {
        let to = p.cast::<[T::Raw; 8]>().add(chunk);
        if mask == u32::MAX {
            *to = value;
        } else {
            let old = *to;
            let mut new = value;
            for i in 0..8 {
                if mask & 1 << (chunk * 8 + i) == 0 {
                    new[i] = old[i];
                }
            }
            *to = new;
        }
    }
}

macro_rules! both {
    ($name:ident, $base:ident, $fast:ident, $slow:ident, $body:ident, [$($g:ident),*], ($($x:ty),*) -> $r:ty) => {
        unsafe fn $base<$($g: Lane,)* F: Fn($($x),*) -> $r + Copy>(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
            // SAFETY: the caller's promise.
            unsafe { $slow::<$($g,)* F>(m, i, mask, conjure()) }
        }
        #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt"))]
        unsafe fn $fast<$($g: Lane,)* F: Fn($($x),*) -> $r + Copy>(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
            // SAFETY: the caller's promise.
            unsafe { $body::<$($g,)* F>(m, i, mask, conjure()) }
        }
        /// A handler that applies `f` to every lane.
        pub fn $name<$($g: Lane,)* F: Fn($($x),*) -> $r + Copy>(_f: F) -> Handler {
            choose($base::<$($g,)* F>, $fast::<$($g,)* F>)
        }
    };
}

#[inline(always)]
unsafe fn body1<A: Lane, D: Lane, F: Fn(A) -> D>(m: &mut Machine, i: &Inst, mask: u32, f: F) -> Flow {
    // SAFETY: slots come from the decoder.
    unsafe {
        let (a, d) = (m.slot(i.a), m.slot(i.dst));
        for c in 0..4 {
            let x = take::<A>(a, c);
            let mut out = [D::Raw::default(); 8];
            for l in 0..8 {
                out[l] = f(A::from_raw(x[l])).to_raw();
            }
            put::<D>(d, c, mask, out);
        }
    }
    Flow::Next
}

#[inline(always)]
unsafe fn body2<A: Lane, B: Lane, D: Lane, F: Fn(A, B) -> D>(
    m: &mut Machine,
    i: &Inst,
    mask: u32,
    f: F,
) -> Flow {
    // SAFETY: slots come from the decoder.
    unsafe {
        let (a, b, d) = (m.slot(i.a), m.slot(i.b), m.slot(i.dst));
        for c in 0..4 {
            let (x, y) = (take::<A>(a, c), take::<B>(b, c));
            let mut out = [D::Raw::default(); 8];
            for l in 0..8 {
                out[l] = f(A::from_raw(x[l]), B::from_raw(y[l])).to_raw();
            }
            put::<D>(d, c, mask, out);
        }
    }
    Flow::Next
}

#[inline(always)]
unsafe fn body3<A: Lane, B: Lane, C: Lane, D: Lane, F: Fn(A, B, C) -> D>(
    m: &mut Machine,
    i: &Inst,
    mask: u32,
    f: F,
) -> Flow {
    // SAFETY: slots come from the decoder.
    unsafe {
        let (a, b, z, d) = (m.slot(i.a), m.slot(i.b), m.slot(i.c), m.slot(i.dst));
        for c in 0..4 {
            let (x, y, w) = (take::<A>(a, c), take::<B>(b, c), take::<C>(z, c));
            let mut out = [D::Raw::default(); 8];
            for l in 0..8 {
                out[l] = f(A::from_raw(x[l]), B::from_raw(y[l]), C::from_raw(w[l])).to_raw();
            }
            put::<D>(d, c, mask, out);
        }
    }
    Flow::Next
}

/// Four sources: the fourth slot is in `ext`.
#[inline(always)]
unsafe fn body4<A: Lane, D: Lane, F: Fn(A, A, u32, u32) -> D>(
    m: &mut Machine,
    i: &Inst,
    mask: u32,
    f: F,
) -> Flow {
    // SAFETY: slots come from the decoder.
    unsafe {
        let (a, b, z, e, d) = (m.slot(i.a), m.slot(i.b), m.slot(i.c), m.slot(i.ext), m.slot(i.dst));
        for c in 0..4 {
            let (x, y, w, v) = (take::<A>(a, c), take::<A>(b, c), take::<u32>(z, c), take::<u32>(e, c));
            let mut out = [D::Raw::default(); 8];
            for l in 0..8 {
                out[l] = f(A::from_raw(x[l]), A::from_raw(y[l]), w[l], v[l]).to_raw();
            }
            put::<D>(d, c, mask, out);
        }
    }
    Flow::Next
}

#[inline(always)]
unsafe fn select_body<A: Lane, F: Fn(A, A) -> bool>(m: &mut Machine, i: &Inst, mask: u32, _f: F) -> Flow {
    // SAFETY: slots and predicates come from the decoder.
    unsafe {
        let (a, b, d, p) = (m.slot(i.a), m.slot(i.b), m.slot(i.dst), m.predicate(i.c));
        for c in 0..4 {
            let (x, y) = (take::<A>(a, c), take::<A>(b, c));
            let mut out = x;
            for l in 0..8 {
                if p & 1 << (c * 8 + l) == 0 {
                    out[l] = y[l];
                }
            }
            put::<A>(d, c, mask, out);
        }
    }
    Flow::Next
}

/// How `setp` combines its comparison with a predicate; the low two bits of `ext`.
pub const COMBINE_AND: u32 = 1;
/// Or.
pub const COMBINE_OR: u32 = 2;
/// Exclusive or.
pub const COMBINE_XOR: u32 = 3;

#[inline(always)]
unsafe fn compare_body<A: Lane, F: Fn(A, A) -> bool>(m: &mut Machine, i: &Inst, mask: u32, f: F) -> Flow {
    // SAFETY: slots and predicates come from the decoder.
    unsafe {
        let (a, b) = (m.slot(i.a), m.slot(i.b));
        let mut bits = [0u32; 8];
        for c in 0..4 {
            let (x, y) = (take::<A>(a, c), take::<A>(b, c));
            for l in 0..8 {
                bits[l] |= if f(A::from_raw(x[l]), A::from_raw(y[l])) { 1 << (c * 8 + l) } else { 0 };
            }
        }
        finish_compare(m, i, mask, bits.iter().fold(0, |all, b| all | b))
    }
}

/// Combines a comparison with `setp`'s third source and writes both destinations.
///
/// # Safety
/// `i` must be an instruction of the running kernel.
pub unsafe fn finish_compare(m: &mut Machine, i: &Inst, mask: u32, bits: u32) -> Flow {
    // SAFETY: predicates come from the decoder.
    unsafe {
        let with = if i.ext == 0 { 0 } else { m.predicate(i.c) };
        let combine = |bits: u32| match i.ext {
            COMBINE_AND => bits & with,
            COMBINE_OR => bits | with,
            COMBINE_XOR => bits ^ with,
            _ => bits,
        };
        if i.dst != SINK {
            m.set_predicate(i.dst, combine(bits), mask);
        }
        // The second destination is kept in imm, plus one.
        if i.imm != 0 {
            m.set_predicate(i.imm as u32 - 1, combine(!bits), mask);
        }
    }
    Flow::Next
}

/// The plain versions: one lane after the other. They serve where AVX2 is missing, and for operations too rare to
/// be worth compiling as vector code.
macro_rules! slow {
    ($slow:ident, $each:ident, $run:ident, [$($g:ident),*], ($($x:ident: $from:ident),*)) => {
        #[inline(always)]
        unsafe fn $slow<$($g: Lane,)* D: Lane, F: Fn($($g),*) -> D>(m: &mut Machine, i: &Inst, mask: u32, f: F) -> Flow {
            // SAFETY: slots come from the decoder.
            unsafe {
                $(let $x = m.slot(i.$from).cast::<$g::Raw>();)*
                let d = m.slot(i.dst).cast::<D::Raw>();
                for lane in lanes(mask) {
                    *d.add(lane) = f($($g::from_raw(*$x.add(lane))),*).to_raw();
                }
            }
            Flow::Next
        }
        /// A handler that applies `f` to one lane after the other.
        pub fn $each<$($g: Lane,)* D: Lane, F: Fn($($g),*) -> D + Copy>(_f: F) -> Handler {
            $run::<$($g,)* D, F>
        }
    };
}

slow!(slow1, each1, each1_run, [A], (x: a));
slow!(slow2, each2, each2_run, [A, B], (x: a, y: b));
slow!(slow3, each3, each3_run, [A, B, C], (x: a, y: b, z: c));

#[inline(always)]
unsafe fn compare_slow<A: Lane, F: Fn(A, A) -> bool>(m: &mut Machine, i: &Inst, mask: u32, f: F) -> Flow {
    // SAFETY: slots and predicates come from the decoder.
    unsafe {
        let (a, b) = (m.slot(i.a).cast::<A::Raw>(), m.slot(i.b).cast::<A::Raw>());
        let mut bits = 0;
        for lane in lanes(mask) {
            bits |= u32::from(f(A::from_raw(*a.add(lane)), A::from_raw(*b.add(lane)))) << lane;
        }
        finish_compare(m, i, mask, bits)
    }
}

/// A comparison of one lane after the other.
pub fn compare_each<A: Lane, F: Fn(A, A) -> bool + Copy>(_f: F) -> Handler {
    compare_base::<A, F>
}

both!(map1, each1_run, map1_fast, slow1, body1, [A, D], (A) -> D);
both!(map2, each2_run, map2_fast, slow2, body2, [A, B, D], (A, B) -> D);
both!(map3, each3_run, map3_fast, slow3, body3, [A, B, C, D], (A, B, C) -> D);
both!(map4, map4_base, map4_fast, body4, body4, [A, D], (A, A, u32, u32) -> D);
both!(compare, compare_base, compare_fast, compare_slow, compare_body, [A], (A, A) -> bool);
both!(choose_lanes, select_base, select_fast, select_body, select_body, [A], (A, A) -> bool);

/// `selp`: `c` is the predicate.
pub fn select<A: Lane>() -> Handler {
    choose_lanes(|_: A, _: A| true)
}

/// Logic on predicates: `f` works on all lanes at once.
pub fn predicates<F: Fn(u32, u32) -> u32 + Copy>(_f: F) -> Handler {
    unsafe fn run<F: Fn(u32, u32) -> u32 + Copy>(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
        // SAFETY: predicates come from the decoder.
        unsafe {
            let (a, b) = (m.predicate(i.a), m.predicate(i.b));
            m.set_predicate(i.dst & !NEGATED, conjure::<F>()(a, b), mask);
        }
        Flow::Next
    }
    run::<F>
}
