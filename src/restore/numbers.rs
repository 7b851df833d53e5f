//! Descriptors change places: each to the number it is to have, in an order in which none is lost.

use std::collections::BTreeMap;

/// A descriptor, and the number it is to have. `from` may be wanted in several places, `to` is one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    pub from: i32,
    pub to: i32,
    pub cloexec: bool,
}

/// The moves that bring all `wanted` about, one after the other; where `from` is `to` only the flag is to be set. Those
/// that go round in a ring take turns over a number that nobody has or wants.
pub fn in_turn(wanted: &[Move]) -> Vec<Move> {
    let (mut steps, moving): (Vec<Move>, Vec<Move>) = wanted.iter().partition(|m| m.from == m.to);
    let mut pending: BTreeMap<i32, Move> = moving.iter().map(|m| (m.to, *m)).collect();
    // How many are still to be made from there.
    let mut users: BTreeMap<i32, usize> = BTreeMap::new();
    for m in pending.values() {
        *users.entry(m.from).or_default() += 1;
    }
    let mut taken: Vec<i32> = wanted.iter().flat_map(|m| [m.from, m.to]).collect();
    taken.sort_unstable();
    taken.dedup();
    let spare = taken.iter().zip(0..).take_while(|(t, n)| *t == n).count() as i32;
    let mut ready: Vec<i32> = pending.keys().copied().collect();
    ready.retain(|to| !users.contains_key(to));
    let mut stepped_aside = None;
    loop {
        while let Some(m) = ready.pop().and_then(|to| pending.remove(&to)) {
            let from = if stepped_aside == Some(m.from) {
                spare
            } else {
                m.from
            };
            steps.push(Move { from, ..m });
            let left = users.entry(m.from).or_default();
            *left = left.saturating_sub(1);
            if *left == 0 && pending.contains_key(&m.from) {
                ready.push(m.from);
            }
        }
        // Only rings are left, and of one that was entered nothing.
        let Some(at) = pending.keys().next().copied() else {
            return steps;
        };
        steps.push(Move {
            from: at,
            to: spare,
            cloexec: true,
        });
        stepped_aside = Some(at);
        ready.push(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: &[(i32, i32)]) -> Vec<Move> {
        let moves: Vec<Move> = wanted
            .iter()
            .map(|(from, to)| Move {
                from: *from,
                to: *to,
                cloexec: to % 2 == 0,
            })
            .collect();
        let steps = in_turn(&moves);
        let mut table: BTreeMap<i32, (i32, bool)> =
            moves.iter().map(|m| (m.from, (m.from, true))).collect();
        for s in &steps {
            let (what, _) = table[&s.from];
            table.insert(s.to, (what, s.cloexec));
        }
        for m in &moves {
            assert_eq!(table[&m.to], (m.from, m.cloexec), "{m:?} of {wanted:?}");
        }
        steps
    }

    #[test]
    fn each_comes_to_its_place() {
        assert_eq!(check(&[]), []);
        assert_eq!(check(&[(64, 0), (65, 1), (64, 2)]).len(), 3);
        // In a row, in a ring, in two, and with others beside them.
        assert_eq!(check(&[(0, 1), (1, 2), (2, 3)]).len(), 3);
        assert_eq!(check(&[(0, 1), (1, 2), (2, 0)]).len(), 4);
        assert_eq!(check(&[(0, 1), (1, 0), (2, 3), (3, 2), (3, 9)]).len(), 7);
        assert_eq!(check(&[(5, 5), (5, 6), (6, 7), (7, 8)]).len(), 4);
    }

    #[test]
    fn so_do_many_in_any_order() {
        let mut seed = 7u64;
        for n in 1..60 {
            let mut places: Vec<i32> = (0..n).collect();
            for i in (1..places.len()).rev() {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                places.swap(i, (seed >> 33) as usize % (i + 1));
            }
            let wanted: Vec<(i32, i32)> = places
                .iter()
                .map(|to| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    ((seed >> 33) as i32 % n, *to)
                })
                .collect();
            check(&wanted);
            check(&places.iter().copied().zip(0..).collect::<Vec<_>>());
        }
    }
}
