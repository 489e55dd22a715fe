//! Stop strings in streamed text: what may be shown, and where the text ends.

/// Holds text back while it may be the beginning of a stop string.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopStrings {
    strings: Vec<String>,
    held: String,
}

/// What became of a piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// The text that is certain now.
    pub(crate) text: String,
    /// Whether a stop string was found; it and what follows are in no text.
    pub(crate) stopped: bool,
}

impl StopStrings {
    /// `strings` has no empty string.
    pub(crate) fn new(strings: Vec<String>) -> Self {
        Self { strings, held: String::new() }
    }

    /// Takes the next piece of text. Where several stop strings occur, the one that is complete first counts, the
    /// longest of those that end together: the same however the text is cut into pieces.
    pub(crate) fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        if let Some((_, start)) = first_match(&self.held, &self.strings) {
            self.held.truncate(start);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.strings.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text still held back, which no stop string will claim any more.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The (end, start) of the match that ends first, and among those the one that starts first.
fn first_match(text: &str, stops: &[String]) -> Option<(usize, usize)> {
    let matches =
        stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)));
    matches.min()
}

/// The length of the longest end of `text` that is a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    // Both are UTF-8: an end of one that equals a beginning of the other starts at a character.
    (1..=longest).rev().find(|&n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopStrings::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut texts = Vec::new();
        for piece in pieces {
            let released = matcher.push(piece);
            texts.push(released.text);
            if released.stopped {
                return (texts, true);
            }
        }
        texts.push(matcher.finish());
        (texts, false)
    }

    #[test]
    fn a_stop_string_across_pieces_never_shows() {
        assert_eq!(run(&["\n\n"], &["a", "\n", "\nb"]), (vec!["a".into(), "".into(), "".into()], true));
        assert_eq!(
            run(&["\n\n"], &["a\n", "b"]),
            (vec!["a".into(), "\nb".into(), "".into()], false),
            "a beginning that isn't continued is shown"
        );
    }

    #[test]
    fn the_stop_string_that_ends_first_wins_then_the_longest() {
        assert_eq!(run(&["bcdX", "cd"], &["abcdX"]), (vec!["ab".into()], true));
        assert_eq!(run(&["cd", "bcd"], &["abcd"]), (vec!["a".into()], true));
    }

    #[test]
    fn characters_of_several_bytes_are_not_cut() {
        assert_eq!(run(&["語。"], &["日本語", "。x"]), (vec!["日本".into(), "".into()], true));
        // é is C3 A9 and è is C3 A8: they share a byte, which must not be held back.
        assert_eq!(run(&["éa"], &["è", "é"]), (vec!["è".into(), "".into(), "é".into()], false));
        assert_eq!(run(&["👍🏽!"], &["👍", "🏽", "!"]), (vec!["".into(), "".into(), "".into()], true));
    }

    proptest! {
        /// However the text is cut into pieces, what is shown is the text before the first stop string.
        #[test]
        fn pieces_do_not_matter(
            text in "[abé語]{0,40}",
            stops in prop::collection::vec("[abé語]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..40, 0..6),
        ) {
            let end = first_match(&text, &stops).map(|(_, start)| start);
            let mut bounds: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).collect();
            bounds.extend([0, text.len()]);
            bounds.sort_unstable();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = bounds.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let (texts, stopped) = run(&stops, &pieces);
            prop_assert_eq!(stopped, end.is_some());
            prop_assert_eq!(texts.concat(), &text[..end.unwrap_or(text.len())]);
        }
    }
}
