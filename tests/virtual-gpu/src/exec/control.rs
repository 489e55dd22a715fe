//! Branches, exits and barriers. Lanes that part at a branch meet again at its immediate post-dominator.

use super::block::{Frame, Status};
use super::{Fault, Machine};
use crate::program::{Flow, Inst, NO_JOIN};
use crate::sanitizer::Kind;
use crate::sanitizer::shared::MAX_WARP_PHASE;

/// Takes lanes from the stack; [`Flow::Done`] when none are left.
fn pop(m: &mut Machine) -> Flow {
    while let Some(frame) = m.block.warps[m.warp].stack.pop() {
        let mask = frame.mask & m.live;
        if mask != 0 {
            (m.pc, m.join, m.mask) = (frame.pc, frame.join, mask);
            return Flow::Next;
        }
    }
    Flow::Done
}

/// Opens a basic block: `imm` is its first instruction, `ext` its index.
///
/// # Safety
/// See [`crate::program::Handler`]; so for all handlers here.
pub unsafe fn open_block(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    if m.join == i.imm as u32 {
        return pop(m);
    }
    let (runs, lanes) = &mut m.block_runs[i.ext as usize];
    *runs += 1;
    *lanes += u64::from(mask.count_ones());
    Flow::Next
}

/// `bra` without a guard, or between blocks.
pub unsafe fn jump(m: &mut Machine, i: &Inst, _mask: u32) -> Flow {
    m.pc = i.imm as u32;
    Flow::Next
}

/// `@p bra`: `a` is the predicate, `ext` the instruction where the ways meet.
pub unsafe fn branch(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: the predicate comes from the decoder.
    let taken = mask & unsafe { m.predicate(i.a) };
    if taken == mask {
        m.pc = i.imm as u32;
    } else if taken != 0 {
        m.counters.divergent_branches += 1;
        let stack = &mut m.block.warps[m.warp].stack;
        if i.ext != NO_JOIN {
            stack.push(Frame { pc: i.ext, join: m.join, mask });
        }
        stack.push(Frame { pc: m.pc, join: i.ext, mask: mask & !taken });
        (m.pc, m.join, m.mask) = (i.imm as u32, i.ext, taken);
    }
    Flow::Next
}

/// `brx.idx`: `a` is the index, `c` the list of targets, `ext` where the ways meet.
pub unsafe fn branch_table(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: the slot comes from the decoder.
    let index = unsafe { *m.slot(i.a).cast::<[u32; 32]>() };
    let kernel = std::sync::Arc::clone(&m.kernel);
    let targets = &kernel.lists[i.c as usize];
    let mut ways: Vec<(u32, u32)> = Vec::new();
    for lane in 0..32u32 {
        if mask >> lane & 1 == 0 {
            continue;
        }
        let Some(&target) = targets.get(index[lane as usize] as usize) else {
            return m.fail(Kind::Stopped, Fault::Trap, i, lane, "brx.idx past the end of its list".into());
        };
        match ways.iter_mut().find(|(pc, _)| *pc == target) {
            Some((_, lanes)) => *lanes |= 1 << lane,
            None => ways.push((target, 1 << lane)),
        }
    }
    if ways.len() > 1 {
        m.counters.divergent_branches += 1;
        let stack = &mut m.block.warps[m.warp].stack;
        if i.ext != NO_JOIN {
            stack.push(Frame { pc: i.ext, join: m.join, mask });
        }
        for &(pc, mask) in &ways[1..] {
            stack.push(Frame { pc, join: i.ext, mask });
        }
        m.join = i.ext;
        m.mask = ways[0].1;
    }
    if let Some(&(pc, _)) = ways.first() {
        m.pc = pc;
    }
    Flow::Next
}

/// `ret` and `exit`.
pub unsafe fn exit(m: &mut Machine, _i: &Inst, mask: u32) -> Flow {
    m.live &= !mask;
    m.mask &= !mask;
    if m.mask != 0 { Flow::Next } else { pop(m) }
}

/// `trap`.
pub unsafe fn trap(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    m.fail(Kind::Stopped, Fault::Trap, i, mask.trailing_zeros(), "the kernel executed trap".into())
}

/// Instructions without an effect that is modelled.
pub unsafe fn nothing(_m: &mut Machine, _i: &Inst, _mask: u32) -> Flow {
    Flow::Next
}

/// `nanosleep`: lets other warps run.
pub unsafe fn pause(_m: &mut Machine, _i: &Inst, _mask: u32) -> Flow {
    Flow::Yield
}

/// `membar` and `fence` of device scope or wider.
pub unsafe fn fence(m: &mut Machine, _i: &Inst, _mask: u32) -> Flow {
    if m.kernel.synchronises {
        let warp = m.warp;
        m.block.order.fence(warp);
    }
    Flow::Next
}

/// `bar.warp.sync`: `a` is the member mask.
pub unsafe fn warp_barrier(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: the slot comes from the decoder.
    unsafe { super::shuffle::check_members(m, i, i.a, mask) };
    let warp = m.warp;
    let passed = &mut m.block.warps[warp].warp_phase;
    *passed += 1;
    if *passed > MAX_WARP_PHASE {
        *passed = 1;
        m.history.restart(m.block.phase, warp as u32);
    }
    Flow::Next
}

/// `bar.sync`, `bar.arrive`, `bar.red`: `a` is the barrier, `b` the count of threads (slot of zeros for all),
/// `imm` the kind (below), `c` the predicate and `dst` the result of a reduction.
pub unsafe fn barrier(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let lane = mask.trailing_zeros();
    // SAFETY: the slots come from the decoder, and `lane` is below 32.
    let (id, count) = unsafe { (*m.slot(i.a).add(lane as usize), *m.slot(i.b).add(lane as usize)) };
    let aligned = i.imm & ALIGNED != 0;
    if m.settings.options.barriers && aligned && mask != m.live {
        let text =
            format!("lanes {:#010x} of the warp are elsewhere while {mask:#010x} wait", m.live & !mask);
        m.report(Kind::DivergentBarrier, i, lane, text);
    }
    if id > 15 || count % 32 != 0 {
        let text = format!("barrier {id} with {count} threads: ids end at 15, counts are multiples of 32");
        return m.fail(Kind::DivergentBarrier, Fault::Trap, i, lane, text);
    }
    let reduce = i.imm & REDUCE != 0;
    // SAFETY: the predicate comes from the decoder.
    let votes = if reduce { unsafe { m.predicate(i.c) & mask } } else { 0 };
    let bar = &mut m.block.barriers[id as usize];
    bar.expected = count;
    // The hardware counts warps, whatever lanes of them arrive.
    bar.arrived += 32;
    bar.sum += votes.count_ones();
    bar.votes += mask.count_ones();
    bar.operation = (i.imm >> OPERATION_SHIFT & 3) as u32;
    if i.imm & ARRIVE != 0 {
        return Flow::Yield;
    }
    let warp = m.warp;
    let warp = &mut m.block.warps[warp];
    warp.status = Status::Waiting(id);
    warp.reduction = reduce.then_some((i.dst, i.imm & TO_PREDICATE != 0));
    Flow::Wait
}

/// The barrier is `.aligned`: all lanes of the warp must arrive together.
pub const ALIGNED: i64 = 1;
/// The warp does not wait.
pub const ARRIVE: i64 = 2;
/// The barrier reduces a predicate.
pub const REDUCE: i64 = 4;
/// The reduction's result is a predicate.
pub const TO_PREDICATE: i64 = 8;
/// Where the operation of the reduction begins: 0 popc, 1 and, 2 or.
pub const OPERATION_SHIFT: u32 = 4;
