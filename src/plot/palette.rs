//! What stands for an expert: a colour, and a shape for those who can't tell colours apart.

use super::Text;

/// Okabe and Ito's colours, which the colour-blind can tell apart; those readable on white and on black first.
const COLORS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#b8a800"];
/// Where no expert acted, or several did.
const NEUTRAL: &str = "#6b6f76";
/// The shapes in units of half a marker's width, from its middle; a circle comes before them.
const SHAPES: [&[(f64, f64)]; 7] = [
    &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    &[(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)],
    &[(0.0, -1.2), (1.0, 0.0), (0.0, 1.2), (-1.0, 0.0)],
    &[(0.0, 1.0), (1.0, -0.9), (-1.0, -0.9)],
    &[(-0.4, -1.0), (0.4, -1.0), (0.4, 1.0), (-0.4, 1.0)],
    &[(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)],
    &[(-1.0, -0.9), (1.0, 0.9), (1.0, -0.9), (-1.0, 0.9)],
];

/// The experts by name, in the order that they were given in: it is their colour and shape, whichever of them act.
pub(super) struct Palette<'a>(Vec<&'a str>);

impl<'a> Palette<'a> {
    pub(super) fn new(texts: &'a [Text]) -> Self {
        let given = texts.iter().flat_map(|text| &text.experts).map(String::as_str);
        let acting = texts.iter().flat_map(|text| &text.records).filter_map(|r| r.expert.as_deref());
        let mut names: Vec<&str> = Vec::new();
        for name in given.chain(acting) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Self(names)
    }

    pub(super) fn names(&self) -> &[&'a str] {
        &self.0
    }

    /// The place of this expert; `None` is no one expert.
    pub(super) fn index(&self, expert: Option<&str>) -> Option<usize> {
        self.0.iter().position(|&name| Some(name) == expert)
    }

    /// The colour at a place.
    pub(super) fn color(index: Option<usize>) -> &'static str {
        index.and_then(|index| COLORS.get(index % COLORS.len())).copied().unwrap_or(NEUTRAL)
    }

    /// The outline of a marker at a place, `size` being half its width: the data of a path.
    pub(super) fn marker(index: Option<usize>, (x, y): (f64, f64), size: f64) -> String {
        use std::fmt::Write;

        let shape = match index {
            // The first is the circle, as is the marker of no one expert, which is drawn hollow.
            None | Some(0) => {
                let (left, wide) = (x - size, 2.0 * size);
                return format!(
                    "M{left:.1} {y:.1}a{size} {size} 0 1 0 {wide} 0a{size} {size} 0 1 0 -{wide} 0z"
                );
            }
            Some(index) => SHAPES.get((index - 1) % SHAPES.len()).copied().unwrap_or_default(),
        };
        let mut path = String::new();
        for (corner, (dx, dy)) in shape.iter().enumerate() {
            let command = if corner == 0 { 'M' } else { 'L' };
            // Writing into a string can't fail.
            let _ = write!(path, "{command}{:.1} {:.1}", x + dx * size, y + dy * size);
        }
        path + "z"
    }
}
