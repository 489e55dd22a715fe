//! The picture for a document: lines of tokens, over each its α as a bar.

use std::fmt::Write;

use super::palette::Palette;
use super::{Record, Text, alpha_text, escape, is_sum, label};

const WIDTH: f64 = 900.0;
const MARGIN: f64 = 16.0;
/// From one line of tokens to the next, of one row of text each.
const LINE: f64 = 96.0;
/// A further row of a token's text.
const ROW: f64 = 19.0;
/// Characters of a prompt that fit above its text.
const HEADING: usize = 98;
const BAR: f64 = 48.0;
const CHARACTER: f64 = 9.0;
/// Room for a marker and α's digits over a token of one character.
const NARROWEST: f64 = 46.0;
/// α at the top of a bar.
const MOST: f64 = 2.0;
/// The legend has its own line or lines; the tokens' numbers begin below.
const LEGEND: f64 = 22.0;
const STYLE: &str = "text{font-family:ui-monospace,Menlo,Consolas,monospace}.token{font-size:15px;text-anchor:middle;\
    fill:#1f2328}.alpha{font-size:11px;text-anchor:middle;fill:#59636e}.legend{font-size:13px;fill:#59636e}\
    .name{font-size:14px;font-weight:bold;fill:#1f2328}.none{fill:none;stroke-width:1.5}\
    .changed{text-decoration:underline;font-weight:bold}.back{fill:#8882}\
    @media(prefers-color-scheme:dark){.token,.name{fill:#e6edf3}.alpha,.legend{fill:#9198a1}}";

/// A character is nine units wide, one outside the Latin blocks up to twice that.
fn character(c: char) -> f64 {
    let narrow = c < '\u{1100}' || matches!(c, '↵' | '⇥' | '∅' | '…' | '\u{2010}'..='\u{2027}');
    if narrow { CHARACTER } else { 2.0 * CHARACTER }
}

fn width(text: &str) -> f64 {
    text.chars().map(character).sum()
}

/// The token's text in rows that fit the picture.
fn rows(text: &str) -> Vec<String> {
    let (mut rows, mut row, mut taken) = (Vec::new(), String::new(), 0.0);
    for c in text.chars() {
        if taken + character(c) > WIDTH - 2.0 * MARGIN - 14.0 {
            rows.push(std::mem::take(&mut row));
            taken = 0.0;
        }
        row.push(c);
        taken += character(c);
    }
    rows.push(row);
    rows
}

/// All texts below one another as one SVG document; bars are α from 0 to 2, an underlined token is one that the large
/// model would not have chosen.
#[must_use]
pub fn svg(texts: &[Text]) -> String {
    let palette = Palette::new(texts);
    let mut body = String::new();
    let mut y = legend(&mut body, &palette, is_sum(texts)) + 24.0;
    for text in texts {
        if texts.len() > 1 || text.prompt.is_some() {
            let name = escape(&label(text, texts, HEADING));
            // Writing into a string can't fail.
            let _ = write!(body, "<text x=\"{MARGIN}\" y=\"{y:.1}\" class=\"name\">{name}</text>");
            y += 30.0;
        }
        let (mut x, mut deepest) = (MARGIN, 1);
        for record in text.records.iter() {
            let rows = rows(&record.shown());
            let width = (rows.iter().map(|row| width(row)).fold(0.0, f64::max) + 10.0).max(NARROWEST);
            if x + width > WIDTH - MARGIN && x > MARGIN {
                (x, y) = (MARGIN, y + LINE + ROW * (deepest - 1) as f64);
                deepest = 1;
            }
            token(&mut body, record, (x, y, width - 4.0), &rows, palette.index(record.expert.as_deref()));
            deepest = deepest.max(rows.len());
            x += width;
        }
        y += LINE + ROW * (deepest - 1) as f64;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" role=\"img\">\
         <title>Tokens and their α</title><style>{STYLE}</style>{body}</svg>\n"
    )
}

/// The marker of an expert, or a hollow one.
fn marker(out: &mut String, index: Option<usize>, at: (f64, f64), size: f64) {
    let (path, color) = (Palette::marker(index, at, size), Palette::color(index));
    let paint = if index.is_some() {
        format!("fill=\"{color}\"")
    } else {
        format!("class=\"none\" stroke=\"{color}\"")
    };
    let _ = write!(out, "<path d=\"{path}\" {paint}/>");
}

/// Draws the legend; how far down it reaches.
fn legend(out: &mut String, palette: &Palette, is_sum: bool) -> f64 {
    let (mut x, mut y) = (MARGIN, LEGEND);
    let bar = if is_sum { "bar: Σα, 0 to 2" } else { "bar: α, 0 to 2" };
    let notes = [bar, "underlined: changed by fusion", "· space", "↵ line end", "∅ no text (end)"];
    let experts = palette.names().iter().enumerate().map(|(index, &name)| (Some(index), name));
    for (index, text) in experts.chain(notes.map(|note| (None, note))) {
        // The letters of the legend are smaller than a token's.
        let room = width(text) * 0.87 + if index.is_some() { 18.0 } else { 0.0 };
        if x + room > WIDTH - MARGIN && x > MARGIN {
            (x, y) = (MARGIN, y + ROW);
        }
        let mut at = x;
        if index.is_some() {
            marker(out, index, (x + 6.0, y - 4.5), 5.5);
            at += 18.0;
        }
        let text = escape(text);
        let _ = write!(out, "<text x=\"{at:.1}\" y=\"{y:.1}\" class=\"legend\">{text}</text>");
        x += room + 22.0;
    }
    y
}

fn token(
    out: &mut String,
    record: &Record,
    (x, y, width): (f64, f64, f64),
    rows: &[String],
    index: Option<usize>,
) {
    let alpha = record.total_alpha();
    let height = BAR * alpha.unwrap_or(0.0).clamp(0.0, MOST) / MOST;
    let (middle, top, fill) = (x + width / 2.0, y + BAR - height, Palette::color(index));
    let number = alpha.map_or_else(|| "–".into(), alpha_text);
    let loss = record.loss.map_or_else(String::new, |loss| format!(", loss {loss:.2e}"));
    let expert = escape(record.expert.as_deref().unwrap_or(""));
    let _ = write!(
        out,
        "<g><title>{}  α {number} {expert}{loss}</title>\
         <rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR:.1}\" class=\"back\"/>\
         <rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>",
        escape(&record.shown()),
    );
    let mut at = middle;
    if alpha.is_some() {
        marker(out, index, (middle - 3.3 * number.chars().count() as f64 - 3.0, y - 8.0), 4.0);
        at += 4.0;
    }
    let _ = write!(out, "<text x=\"{at:.1}\" y=\"{:.1}\" class=\"alpha\">{number}</text>", y - 4.0);
    let changed = if record.changed == Some(true) { " changed" } else { "" };
    for (row, text) in rows.iter().enumerate() {
        let (below, text) = (y + BAR + 17.0 + ROW * row as f64, escape(text));
        let _ =
            write!(out, "<text x=\"{middle:.1}\" y=\"{below:.1}\" class=\"token{changed}\">{text}</text>");
    }
    out.push_str("</g>");
}
