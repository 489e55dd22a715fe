//! Exchange between the lanes of a warp: shuffles, votes, matches, reductions.

use super::Machine;
use super::address::lanes;
use super::lanes::handler;
use crate::program::{CONSTANT, Flow, Inst, SINK};
use crate::sanitizer::Kind;

/// Checks a member mask: every executing lane is in it, the lanes give the same mask, and no lane in it is
/// elsewhere. Lanes that have left do not count.
///
/// # Safety
/// `slot` must be the running kernel's, and so for all handlers here.
#[inline(always)]
pub unsafe fn check_members(m: &mut Machine, i: &Inst, slot: u32, mask: u32) {
    if !m.settings.options.masks {
        return;
    }
    // SAFETY: the caller's promise.
    let members = unsafe { &*m.slot(slot).cast::<[u32; 32]>() };
    let first = members[mask.trailing_zeros() as usize & 31];
    // Whether the lanes differ; of lanes that don't execute it may say so too soon.
    let differ = members.iter().fold(0, |differ, own| differ | own ^ first);
    // With one mask for all: every executing lane is in it, and nobody else that is alive.
    if differ != 0 || mask & !first != 0 || first & m.live & !mask != 0 {
        report_members(m, i, *members, mask);
    }
}

#[cold]
#[inline(never)]
fn report_members(m: &mut Machine, i: &Inst, members: [u32; 32], mask: u32) {
    let first = members[mask.trailing_zeros() as usize & 31];
    for lane in lanes(mask) {
        let own = members[lane];
        if own >> lane & 1 == 0 {
            let text = format!("lane {lane} is not in its own member mask {own:#010x}");
            return m.report(Kind::ShuffleMask, i, lane as u32, text);
        }
        if own != first {
            let text = format!("lanes name different member masks, {first:#010x} and {own:#010x}");
            return m.report(Kind::ShuffleMask, i, lane as u32, text);
        }
    }
    let missing = first & m.live & !mask;
    if missing != 0 {
        let text = format!("member mask {first:#010x} names lanes {missing:#010x}, which are elsewhere");
        m.report(Kind::ShuffleMask, i, mask.trailing_zeros(), text);
    }
}

/// Shuffle modes, the low byte of `imm`.
pub const MODES: [&str; 4] = ["up", "down", "bfly", "idx"];

handler! {
    /// `shfl.sync`: `a` value, `b` lane operand, `c` clamp, `ext` member mask; the predicate, plus one, is in `imm`
    /// above bit 8.
    shuffle = shuffle_body
}

/// The lane that each lane reads, itself where the one it names is out of range, and which those are not.
#[inline(always)]
fn sources(mode: i64, operand: &[u32; 32], clamp: &[u32; 32]) -> ([u32; 32], u32) {
    let (mut from, mut inside) = ([0; 32], 0);
    for own in 0..32u32 {
        let (b, c) = (operand[own as usize] & 31, clamp[own as usize]);
        let (c, segment) = (c & 31, c >> 8 & 31);
        let most = (own & segment) | (c & !segment);
        let (lane, ok) = match mode & 3 {
            0 => (own.wrapping_sub(b), own as i32 - b as i32 >= most as i32),
            1 => (own + b, own + b <= most),
            2 => (own ^ b, own ^ b <= most),
            _ => {
                let lane = (own & segment) | (b & !segment);
                (lane, lane <= most)
            }
        };
        from[own as usize] = if ok { lane } else { own } & 31;
        inside |= u32::from(ok) << own;
    }
    (from, inside)
}

#[inline(always)]
fn exchange<const BIT: usize>(value: &[u32; 32], to: &mut [u32; 32]) {
    for lane in 0..32 {
        to[lane] = value[lane ^ BIT];
    }
}

#[inline(always)]
unsafe fn shuffle_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: slots come from the decoder.
    unsafe {
        check_members(m, i, i.ext, mask);
        let value = *m.slot(i.a).cast::<[u32; 32]>();
        let (operand, clamp) = (&*m.slot(i.b).cast::<[u32; 32]>(), &*m.slot(i.c).cast::<[u32; 32]>());
        // Nearly all shuffles exchange with the lane whose number differs in one bit.
        let butterfly = mask == u32::MAX && i.imm == 2 && i.b & i.c & CONSTANT != 0 && clamp[0] == 31;
        if butterfly && i.dst != SINK && operand[0].is_power_of_two() && operand[0] < 32 {
            let dst = &mut *m.slot(i.dst).cast::<[u32; 32]>();
            match operand[0] {
                1 => exchange::<1>(&value, dst),
                2 => exchange::<2>(&value, dst),
                4 => exchange::<4>(&value, dst),
                8 => exchange::<8>(&value, dst),
                _ => exchange::<16>(&value, dst),
            }
            return Flow::Next;
        }
        // One loop for each mode, without a choice inside.
        let (from, inside) = match i.imm & 3 {
            0 => sources(0, operand, clamp),
            1 => sources(1, operand, clamp),
            2 => sources(2, operand, clamp),
            _ => sources(3, operand, clamp),
        };
        if mask != u32::MAX && m.settings.options.masks {
            let absent = lanes(mask).filter(|&lane| mask >> from[lane] & 1 == 0).last();
            if let Some(lane) = absent {
                let text = format!("lane {lane} reads lane {}, which does not take part", from[lane]);
                m.report(Kind::ShuffleMask, i, lane as u32, text);
            }
        }
        if i.dst != SINK {
            let dst = m.slot(i.dst);
            if mask == u32::MAX {
                for (lane, &from) in from.iter().enumerate() {
                    *dst.add(lane) = value[from as usize & 31];
                }
            } else {
                for lane in lanes(mask) {
                    *dst.add(lane) = value[from[lane] as usize & 31];
                }
            }
        }
        let predicate = (i.imm >> 8) as u32;
        if predicate != 0 {
            m.set_predicate(predicate - 1, inside & mask, mask);
        }
    }
    Flow::Next
}

/// `vote.sync`: `a` predicate, `b` member mask; `imm` is 0 all, 1 any, 2 uni, 3 ballot.
pub unsafe fn vote(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: slots and predicates come from the decoder.
    unsafe {
        check_members(m, i, i.b, mask);
        let yes = m.predicate(i.a) & mask;
        let truth = match i.imm {
            0 => yes == mask,
            1 => yes != 0,
            2 => yes == mask || yes == 0,
            _ => {
                let dst = m.slot(i.dst);
                lanes(mask).for_each(|lane| *dst.add(lane) = yes);
                return Flow::Next;
            }
        };
        m.set_predicate(i.dst, if truth { u32::MAX } else { 0 }, mask);
    }
    Flow::Next
}

/// `activemask`.
pub unsafe fn active_mask(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: the slot comes from the decoder.
    unsafe {
        let dst = m.slot(i.dst);
        lanes(mask).for_each(|lane| *dst.add(lane) = mask);
    }
    Flow::Next
}

/// `match.sync`: `a` value, `b` member mask; `imm` bit 0 all (else any), bit 1 64-bit values; the predicate, plus
/// one, above bit 8.
pub unsafe fn match_lanes(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: slots come from the decoder, which knows their width.
    unsafe {
        check_members(m, i, i.b, mask);
        let slot = m.slot(i.a);
        let value = |lane: usize| {
            if i.imm & 2 != 0 { *slot.cast::<u64>().add(lane) } else { u64::from(*slot.add(lane)) }
        };
        let mut out = [0u32; 32];
        for lane in lanes(mask) {
            out[lane] =
                lanes(mask).filter(|&other| value(other) == value(lane)).fold(0, |all, o| all | 1 << o);
        }
        let all = i.imm & 1 != 0;
        let same = lanes(mask).all(|lane| out[lane] == mask);
        let dst = m.slot(i.dst);
        for lane in lanes(mask) {
            *dst.add(lane) = if all && !same { 0 } else { out[lane] };
        }
        let predicate = (i.imm >> 8) as u32;
        if predicate != 0 {
            m.set_predicate(predicate - 1, if same { u32::MAX } else { 0 }, mask);
        }
    }
    Flow::Next
}

/// `redux.sync`: `a` value, `b` member mask; `imm` names the operation.
pub unsafe fn reduce(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: slots come from the decoder.
    unsafe {
        check_members(m, i, i.b, mask);
        let value = *m.slot(i.a).cast::<[u32; 32]>();
        let all = lanes(mask).map(|lane| value[lane]);
        let result = match i.imm {
            0 => all.fold(0, u32::wrapping_add),
            1 => all.fold(u32::MAX, u32::min),
            2 => all.fold(0, u32::max),
            3 => all.fold(i32::MAX, |x, y| x.min(y as i32)) as u32,
            4 => all.fold(i32::MIN, |x, y| x.max(y as i32)) as u32,
            5 => all.fold(u32::MAX, |x, y| x & y),
            6 => all.fold(0, |x, y| x | y),
            _ => all.fold(0, |x, y| x ^ y),
        };
        let dst = m.slot(i.dst);
        lanes(mask).for_each(|lane| *dst.add(lane) = result);
    }
    Flow::Next
}
