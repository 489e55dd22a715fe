//! Graphs: capture of streams, and the orders in which their nodes may run.

use crate::device::{Code, Work, code};
use crate::exec::draw;

/// A node: its work and the nodes that come before it.
#[derive(Clone)]
pub struct Node {
    /// What it does, with parameters as they were at capture.
    pub work: Work,
    /// Indices of nodes that must have run.
    pub after: Vec<usize>,
}

/// A graph. Nodes follow all nodes they depend on.
#[derive(Clone, Default)]
pub struct Graph {
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// A capture under way.
#[derive(Default)]
pub struct Capture {
    /// What was captured.
    pub graph: Graph,
    /// The stream on which it began.
    pub origin: u64,
    /// A call broke it: it can only be ended.
    pub invalid: bool,
}

impl Capture {
    /// Adds a node behind `after`.
    pub fn add(&mut self, work: Work, after: Vec<usize>) -> Result<usize, Code> {
        if self.invalid {
            return Err(code::CAPTURE_INVALIDATED);
        }
        if matches!(work, Work::Allocate(_) | Work::Free(_) | Work::Graph(_)) {
            self.invalid = true;
            return Err(code::CAPTURE_UNSUPPORTED);
        }
        self.graph.nodes.push(Node { work, after });
        Ok(self.graph.nodes.len() - 1)
    }
}

impl Graph {
    /// An order that respects all dependencies: that of capture, or a seeded one.
    pub fn order(&self, seed: u64, random: &mut u64) -> Vec<usize> {
        if seed == 0 {
            return (0..self.nodes.len()).collect();
        }
        let mut done = vec![false; self.nodes.len()];
        let mut out = Vec::new();
        while out.len() < self.nodes.len() {
            let ready: Vec<usize> = (0..self.nodes.len())
                .filter(|&n| !done[n] && self.nodes[n].after.iter().all(|&before| done[before]))
                .collect();
            let Some(&next) = ready.get(draw(random) as usize % ready.len().max(1)) else { break };
            done[next] = true;
            out.push(next);
        }
        out
    }

    /// Whether every node comes before one of `last`, or is one of them.
    pub fn joined(&self, last: &[usize]) -> bool {
        let mut reached = vec![false; self.nodes.len()];
        let mut stack = last.to_vec();
        while let Some(node) = stack.pop() {
            if !std::mem::replace(&mut reached[node], true) {
                stack.extend(&self.nodes[node].after);
            }
        }
        reached.into_iter().all(|r| r)
    }
}
