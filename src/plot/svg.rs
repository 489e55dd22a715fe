//! The picture for a document: lines of tokens, over each its α as a bar.

use std::fmt::Write;

use super::{Record, escape, experts};

/// Okabe and Ito's colours, which the colour-blind can tell apart; those readable on white and on black first.
const COLORS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#b8a800"];
const WIDTH: f64 = 900.0;
const MARGIN: f64 = 16.0;
const LINE: f64 = 96.0;
const BAR: f64 = 48.0;
const CHARACTER: f64 = 9.0;
/// Room for α's digits over a token of one character.
const NARROWEST: f64 = 34.0;
/// α at the top of a bar.
const MOST: f64 = 2.0;
const STYLE: &str = "text{font-family:ui-monospace,Menlo,Consolas,monospace}.token{font-size:15px;text-anchor:middle;\
    fill:#1f2328}.alpha{font-size:11px;text-anchor:middle;fill:#59636e}.legend{font-size:13px;fill:#59636e}\
    .changed{text-decoration:underline;font-weight:bold}.back{fill:#8882}\
    @media(prefers-color-scheme:dark){.token{fill:#e6edf3}.alpha,.legend{fill:#9198a1}}";

pub(super) fn color(names: &[&str], expert: Option<&str>) -> &'static str {
    let index = names.iter().position(|&name| Some(name) == expert);
    index.and_then(|index| COLORS.get(index % COLORS.len())).copied().unwrap_or("#6b6f76")
}

/// The token's width: a character is nine units, one outside the Latin blocks up to twice that.
fn width(text: &str) -> f64 {
    let units: f64 = text.chars().map(|c| if c < '\u{1100}' || c == '↵' { 1.0 } else { 2.0 }).sum();
    (CHARACTER * units + 10.0).max(NARROWEST)
}

/// All texts below one another as one SVG document; bars are α from 0 to 2, an underlined token is one that the large
/// model would not have chosen.
#[must_use]
pub fn svg(texts: &[Vec<Record>]) -> String {
    let names = experts(texts);
    let (mut body, mut y) = (String::new(), 46.0);
    legend(&mut body, &names);
    for text in texts {
        let mut x = MARGIN;
        for record in text {
            let width = width(&record.shown());
            if x + width > WIDTH - MARGIN && x > MARGIN {
                (x, y) = (MARGIN, y + LINE);
            }
            token(&mut body, record, (x, y, width - 4.0), color(&names, record.expert.as_deref()));
            x += width;
        }
        y += LINE;
    }
    let height = y;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\
         <title>Tokens and their α</title><style>{STYLE}</style>{body}</svg>\n"
    )
}

fn legend(out: &mut String, names: &[&str]) {
    let mut x = MARGIN;
    for name in names {
        let (fill, at, name_text) = (color(names, Some(name)), x + 18.0, escape(name));
        // Writing into a string can't fail.
        let _ = write!(out, "<rect x=\"{x}\" y=\"10\" width=\"12\" height=\"12\" fill=\"{fill}\"/>");
        let _ = write!(out, "<text x=\"{at}\" y=\"20\" class=\"legend\">{name_text}</text>");
        x += 40.0 + width(name);
    }
    let note = "bars: α from 0 to 2 · underlined: not the large model’s choice";
    let _ = write!(out, "<text x=\"{x}\" y=\"20\" class=\"legend\">{note}</text>");
}

fn token(out: &mut String, record: &Record, (x, y, width): (f64, f64, f64), fill: &str) {
    let (alpha, text) = (record.total_alpha(), escape(&record.shown()));
    let height = BAR * alpha.unwrap_or(0.0).clamp(0.0, MOST) / MOST;
    let (middle, top) = (x + width / 2.0, y + BAR - height);
    let label = alpha.map_or_else(|| "–".into(), |alpha| format!("{alpha:.1}"));
    let loss = record.loss.map_or_else(String::new, |loss| format!(", loss {loss:.2e}"));
    let expert = escape(record.expert.as_deref().unwrap_or(""));
    let changed = if record.changed == Some(true) { " changed" } else { "" };
    let _ = write!(
        out,
        "<g><title>{text}  α {label} {expert}{loss}</title>\
         <rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR:.1}\" class=\"back\"/>\
         <rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>\
         <text x=\"{middle:.1}\" y=\"{:.1}\" class=\"alpha\">{label}</text>\
         <text x=\"{middle:.1}\" y=\"{:.1}\" class=\"token{changed}\">{text}</text></g>",
        y - 4.0,
        y + BAR + 17.0,
    );
}
