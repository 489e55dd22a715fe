//! From tokens to the text that may be shown.

use crate::generate::stop::StopStrings;

/// Decodes a sequence's tokens and looks for stop strings. Without a tokenizer all text is empty.
#[derive(Debug)]
pub(crate) struct Text {
    #[cfg(feature = "tokenizer")]
    pub(crate) decoder: Option<crate::tokenizer::Decoder>,
    pub(crate) stop: StopStrings,
}

/// What one token added.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// The characters that became whole with this token.
    pub(crate) piece: String,
    /// The text that no stop string can claim any more.
    pub(crate) text: String,
    /// Whether a stop string was found.
    pub(crate) stopped: bool,
}

impl Text {
    /// Takes the next token. `may_stop`: stop strings count from here on; `last`: no token follows.
    pub(crate) fn push(&mut self, token: u32, may_stop: bool, last: bool) -> Decoded {
        let piece = self.decode(token, last);
        if !may_stop {
            return Decoded { text: piece.clone(), piece, stopped: false };
        }
        let mut released = self.stop.push(&piece);
        if last && !released.stopped {
            released.text.push_str(&self.stop.finish());
        }
        Decoded { piece, text: released.text, stopped: released.stopped }
    }

    #[cfg(feature = "tokenizer")]
    fn decode(&mut self, token: u32, last: bool) -> String {
        let Some(decoder) = &mut self.decoder else { return String::new() };
        let mut piece = decoder.push(token);
        if last {
            piece.push_str(&decoder.finish());
        }
        piece
    }

    #[cfg(not(feature = "tokenizer"))]
    fn decode(&mut self, _token: u32, _last: bool) -> String {
        String::new()
    }
}
