//! Basic blocks of a kernel, and where the ways out of a branch meet: the immediate post-dominator.

/// A block: instructions `[start, end)`, and the blocks that may follow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// First instruction.
    pub start: usize,
    /// Behind the last instruction.
    pub end: usize,
    /// Blocks that may follow.
    pub next: Vec<usize>,
    /// Whether lanes may leave the kernel here.
    pub leaves: bool,
}

/// The immediate post-dominator of each block: None where the ways meet only at the kernel's end.
pub fn post_dominators(nodes: &[Node]) -> Vec<Option<usize>> {
    // The virtual end has number `end`; orders are over the reversed graph, which starts there.
    let end = nodes.len();
    let mut reversed: Vec<Vec<usize>> = vec![Vec::new(); end + 1];
    for (n, node) in nodes.iter().enumerate() {
        for &next in &node.next {
            reversed[next].push(n);
        }
        if node.leaves || node.next.is_empty() {
            reversed[end].push(n);
        }
    }
    let order = post_order(&reversed, end);
    let mut rank = vec![usize::MAX; end + 1];
    for (position, &n) in order.iter().enumerate() {
        rank[n] = position;
    }
    let mut idom = vec![usize::MAX; end + 1];
    idom[end] = end;
    let mut changed = true;
    while changed {
        changed = false;
        for &n in order.iter().rev().filter(|&&n| n != end) {
            let node = &nodes[n];
            let to_end = (node.leaves || node.next.is_empty()).then_some(end);
            let mut best = usize::MAX;
            for s in node.next.iter().copied().chain(to_end).filter(|&s| idom[s] != usize::MAX) {
                best = if best == usize::MAX { s } else { meet(&idom, &rank, best, s) };
            }
            if idom[n] != best {
                idom[n] = best;
                changed = true;
            }
        }
    }
    idom[..end].iter().map(|&d| (d < end).then_some(d)).collect()
}

fn meet(idom: &[usize], rank: &[usize], mut a: usize, mut b: usize) -> usize {
    while a != b {
        while rank[a] < rank[b] {
            a = idom[a];
        }
        while rank[b] < rank[a] {
            b = idom[b];
        }
    }
    a
}

fn post_order(edges: &[Vec<usize>], start: usize) -> Vec<usize> {
    let mut seen = vec![false; edges.len()];
    let mut out = Vec::new();
    let mut stack = vec![(start, 0)];
    seen[start] = true;
    while let Some((n, edge)) = stack.pop() {
        match edges[n].get(edge) {
            Some(&to) => {
                stack.push((n, edge + 1));
                if !seen[to] {
                    seen[to] = true;
                    stack.push((to, 0));
                }
            }
            None => out.push(n),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(edges: &[&[usize]]) -> Vec<Node> {
        edges.iter().map(|next| Node { next: next.to_vec(), ..Node::default() }).collect()
    }

    #[test]
    fn diamond_and_loop() {
        // 0 -> 1, 2; both -> 3; 3 -> 1 (loop), 4
        let p = post_dominators(&graph(&[&[1, 2], &[3], &[3], &[1, 4], &[]]));
        assert_eq!(p, [Some(3), Some(3), Some(3), Some(4), None]);
    }

    #[test]
    fn an_early_return_moves_the_meeting_to_the_end() {
        // 0 -> 1, 2; 1 leaves; 2 -> 3.
        let p = post_dominators(&graph(&[&[1, 2], &[], &[3], &[]]));
        assert_eq!(p, [None, None, Some(3), None]);
    }

    #[test]
    fn a_break_out_of_two_loops() {
        // 0 -> 1; 1 -> 2, 5; 2 -> 3, 4; 3 -> 2, 5 (break of both); 4 -> 1; 5 end
        let p = post_dominators(&graph(&[&[1], &[2, 5], &[3, 4], &[2, 5], &[1], &[]]));
        assert_eq!(p, [Some(1), Some(5), Some(5), Some(5), Some(1), None]);
    }
}
