//! Text on a terminal, each token coloured by its α.

use std::io::IsTerminal;

/// Whether text on stdout is coloured: on a terminal, unless `NO_COLOR` is set.
pub(crate) fn enabled() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The colours of α = 0, 0.25, … 2 and above, in the terminal's 256-colour palette: grey where the large model
/// goes its own way, then blue, green, yellow, red as the experts pull harder.
const SCALE: [u8; 9] = [250, 117, 81, 79, 78, 148, 220, 214, 203];

/// `text` in the colour of `alpha`.
pub(crate) fn by_alpha(text: &str, alpha: f64) -> String {
    // `as` saturates: a negative α and NaN are grey, a large one red.
    let color = SCALE[((alpha * 4.0).round() as usize).min(SCALE.len() - 1)];
    // Attributes don't survive the end of a line in every terminal.
    let lines: Vec<String> = text
        .split('\n')
        .map(|line| if line.is_empty() { String::new() } else { format!("\x1b[38;5;{color}m{line}\x1b[0m") })
        .collect();
    lines.join("\n")
}

/// `text` as what was asked, which stands back behind what is answered.
pub(crate) fn dimmed(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(|line| format!("\x1b[2m{line}\x1b[0m")).collect();
    lines.join("\n")
}

/// The scale with its numbers.
pub(crate) fn legend() -> String {
    let steps = [0.0, 0.5, 1.0, 1.5, 2.0];
    steps.map(|alpha| by_alpha(&format!("{alpha:.1}"), alpha)).join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_coloured_one_by_one() {
        assert_eq!(by_alpha("a\nb", 0.0), "\x1b[38;5;250ma\x1b[0m\n\x1b[38;5;250mb\x1b[0m");
    }

    #[test]
    fn any_alpha_has_a_colour() {
        for alpha in [-1.0, 0.0, 1.94, 2.0, 50.0, f64::NAN, f64::INFINITY] {
            assert!(by_alpha("x", alpha).ends_with("mx\x1b[0m"));
        }
    }
}
