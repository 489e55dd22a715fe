//! The page: the text, token by token, its charts, and the numbers of the token that is looked at.

use std::fmt::Write;

use serde_json::{Value, json};

use super::chart::{charts, class};
use super::palette::Palette;
use super::{Record, Text, alpha_text, escape, is_sum, label, unprintable, visible};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Characters of a prompt above its text.
const HEADING: usize = 400;

/// One self-contained page: no link leads out of it, it loads nothing, and its policy forbids it to.
#[must_use]
pub fn html(texts: &[Text]) -> String {
    let palette = Palette::new(texts);
    let (mut body, mut records) = (String::new(), Vec::new());
    for text in texts {
        section(&mut body, text, texts, &palette, records.len());
        records.extend(text.records.iter().map(|record| data(record, text, &palette)));
    }
    // Nothing in it may end the element.
    let records = Value::from(records)
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026");
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>Tokens and their α</title>\
         <style>{STYLE}{}</style></head>\n<body>{}<div id=\"page\"><main>{body}</main>\
         <aside id=\"detail\" aria-label=\"The token\" aria-live=\"polite\">\
         <p class=\"hint\">Point at a token, or press Tab and walk with the arrow keys.</p></aside></div>\n\
         <script type=\"application/json\" id=\"records\">{records}</script>\n\
         <script>//<![CDATA[\n{SCRIPT}//]]></script></body></html>\n",
        colors(&palette),
        header(&palette),
    )
}

/// The styles that depend on the trace: one colour an expert, one shade a tenth of α.
fn colors(palette: &Palette) -> String {
    let mut style = String::new();
    for index in 0..palette.names().len() {
        // Writing into a string can't fail.
        let _ = write!(style, ".e{index}{{--c:{}}}", Palette::color(Some(index)));
    }
    for tenth in 0..=20 {
        let _ = write!(style, ".a{tenth}{{--a:{}%}}", tenth * 4);
    }
    style
}

/// An expert's marker as an element.
fn marker(expert: Option<usize>) -> String {
    format!(
        "<svg class=\"m {}\" viewBox=\"0 0 14 14\" aria-hidden=\"true\"><path d=\"{}\" class=\"mark {0}\"/></svg>",
        class(expert),
        Palette::marker(expert, (7.0, 7.0), 5.0),
    )
}

fn header(palette: &Palette) -> String {
    let mut experts = String::new();
    for (index, name) in palette.names().iter().enumerate() {
        let _ = write!(experts, "<li>{}{}</li>", marker(Some(index)), escape(name));
    }
    let mut ramp = String::new();
    for tenth in (0..=20).step_by(2) {
        let _ = write!(ramp, "<i class=\"a{tenth}\"></i>");
    }
    format!(
        "<header><h1>Tokens and their α</h1><div id=\"controls\"><fieldset><legend>Colour by</legend>\
         <label><input type=\"radio\" name=\"by\" value=\"expert\" checked=\"checked\"/> expert</label>\
         <label><input type=\"radio\" name=\"by\" value=\"alpha\"/> α</label></fieldset>\
         <button id=\"theme\" type=\"button\">Dark theme</button></div>\
         <ul id=\"legend\">{experts}<li class=\"ramp\">α 0 <span>{ramp}</span> 2</li>\
         <li><b class=\"changed\">token</b> not the large model’s choice</li>\
         <li><b class=\"plain\">∅</b> no text of its own: the end, or part of a character</li>\
         <li><b class=\"plain\">·</b> a token of spaces</li>\
         <li>charts: thick lines are what fusion reached, thin ones its targets, in the experts’ colours</li></ul></header>"
    )
}

/// One text: what it is, its tokens, its charts. `first` is the page's number of its first token.
fn section(out: &mut String, text: &Text, texts: &[Text], palette: &Palette, first: usize) {
    let name = escape(&label(text, texts, HEADING));
    let _ = write!(
        out,
        "<section><h2>{name}</h2><p class=\"summary\">{}</p>\
         <div class=\"tokens\" role=\"listbox\" aria-orientation=\"horizontal\" aria-label=\"Tokens of {name}\">",
        escape(&summary(text, palette)),
    );
    for (index, record) in text.records.iter().enumerate() {
        let expert = palette.index(record.expert.as_deref());
        let changed = if record.changed == Some(true) { " changed" } else { "" };
        let shade = record
            .total_alpha()
            .map_or(String::new(), |alpha| format!(" a{}", (alpha.clamp(0.0, 2.0) * 10.0).round()));
        let number = first + index;
        let _ = write!(
            out,
            "<span role=\"option\" id=\"t{number}\" tabindex=\"{}\" aria-selected=\"false\" aria-label=\"{}\" \
             class=\"{}{shade}{changed}\">{}{}</span>",
            if number == 0 { 0 } else { -1 },
            escape(&spoken(record)),
            class(expert),
            if expert.is_some() { marker(expert) } else { String::new() },
            escape(&readable(&record.text)),
        );
    }
    let _ = write!(out, "</div>{}</section>", charts(text, palette, first));
}

/// The text as it reads: spaces stay spaces, lines end where they ended.
fn readable(text: &str) -> String {
    if text.trim_matches(' ').is_empty() {
        return visible(text);
    }
    let mut readable = String::new();
    for c in text.chars() {
        match c {
            '\n' => readable.push_str("↵\n"),
            '\t' => readable.push('⇥'),
            c if unprintable(c) => readable.push('\u{fffd}'),
            c => readable.push(c),
        }
    }
    readable
}

fn spoken(record: &Record) -> String {
    let mut spoken = record.shown();
    if let Some(alpha) = record.total_alpha() {
        let _ = write!(spoken, ", α {}", alpha_text(alpha));
    }
    if let Some(expert) = &record.expert {
        let _ = write!(spoken, ", {expert}");
    }
    if record.changed == Some(true) {
        spoken.push_str(", changed by fusion");
    }
    spoken
}

fn summary(text: &Text, palette: &Palette) -> String {
    let count = |what: &dyn Fn(&Record) -> bool| text.records.iter().filter(|r| what(r)).count();
    let plural = if text.records.len() == 1 { "" } else { "s" };
    let mut summary = format!("{} token{plural}", text.records.len());
    let alphas: Vec<f64> = text.records.iter().filter_map(Record::total_alpha).collect();
    if alphas.is_empty() {
        summary.push_str(", no fusion");
        return summary;
    }
    let mean = alphas.iter().sum::<f64>() / alphas.len() as f64;
    let sum = if is_sum(std::slice::from_ref(text)) { "Σα" } else { "α" };
    let changed = count(&|r| r.changed == Some(true));
    let _ = write!(summary, ", {changed} changed by fusion; mean {sum} {mean:.2}");
    for name in palette.names() {
        let acted = count(&|r| r.expert.as_deref() == Some(name));
        if acted > 0 {
            let _ = write!(summary, "; {name} acted on {acted}");
        }
    }
    summary
}

/// What the page shows of a token.
fn data(record: &Record, text: &Text, palette: &Palette) -> Value {
    let name = |t: usize| text.expert(t);
    let own = |id: u32, text: Option<&String>| json!([text.map(|text| visible(text)), id]);
    let expert = palette.index(record.expert.as_deref());
    let experts: Vec<Value> = (record.argmax_expert.iter().enumerate())
        .map(|(t, &id)| json!([name(t), own(id, record.argmax_expert_text.get(t))]))
        .collect();
    json!({
        "step": record.step,
        "id": record.token_id,
        "text": record.shown(),
        "expert": record.expert,
        "marker": Palette::marker(expert, (7.0, 7.0), 5.0),
        "class": class(expert),
        "alpha": record.alpha.iter().enumerate().map(|(t, alpha)| json!([name(t), alpha])).collect::<Vec<_>>(),
        "loss": record.loss,
        "kl": [[record.kl_fused_large, record.kl_expert_small], [record.kl_large_fused, record.kl_small_expert]],
        "names": (0..record.kl_expert_small.len()).map(name).collect::<Vec<_>>(),
        "large": record.argmax_large.map(|id| own(id, record.argmax_large_text.as_ref())),
        "experts": experts,
        "changed": record.changed,
    })
}
