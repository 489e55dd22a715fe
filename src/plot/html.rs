//! The page: the text, token by token, with the numbers of the one that is looked at.

use std::fmt::Write;

use super::svg::color;
use super::{Record, escape, experts};

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:60rem;padding:0 1rem;\
    background:#fff;color:#1f2328;color-scheme:light dark}button{font:inherit;color:inherit;background:none;border:0;\
    border-bottom:4px solid;padding:0 .1em;margin:.1em;white-space:pre-wrap;overflow-wrap:anywhere;\
    font-family:ui-monospace,monospace}button.changed{text-decoration:underline;font-weight:bold}\
    button:focus-visible{outline:3px solid #0072b2}#detail{white-space:pre-wrap;overflow-wrap:anywhere;\
    position:sticky;top:0;background:#fff;min-height:9em;padding:.5em 0;border-bottom:1px solid #8888}\
    @media(prefers-color-scheme:dark){body,#detail{background:#0d1117;color:#e6edf3}}";

/// Focus or hover shows a token's numbers; the arrow keys walk.
const SCRIPT: &str = "const all=[...document.querySelectorAll('main button')],box=document.getElementById('detail');\
    const show=b=>{box.textContent=b.title};all.forEach((b,i)=>{b.onfocus=b.onmouseenter=()=>show(b);\
    b.onkeydown=e=>{const d={ArrowRight:1,ArrowDown:1,ArrowLeft:-1,ArrowUp:-1}[e.key];\
    if(d){e.preventDefault();all[i+d]?.focus()}}})";

/// One self-contained page: no link leads out of it, and it loads nothing.
#[must_use]
pub fn html(texts: &[Vec<Record>]) -> String {
    let names = experts(texts);
    let mut body = String::new();
    for (index, text) in texts.iter().enumerate() {
        // Writing into a string can't fail.
        let _ = write!(body, "<h2>Text {}</h2><p>", index + 1);
        for record in text {
            let class = if record.changed == Some(true) { " class=\"changed\"" } else { "" };
            let color = color(&names, record.expert.as_deref());
            let title = escape(&detail(record)).replace('\n', "&#10;");
            let shown = escape(&record.shown());
            let _ = write!(
                body,
                "<button{class} style=\"border-color:{color}\" title=\"{title}\">{shown}</button>"
            );
        }
        body.push_str("</p>");
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta name=\"viewport\" content=\"width=device-width\"/><title>Tokens and their α</title>\
         <style>{STYLE}</style></head><body><h1>Tokens and their α</h1>\
         <p>The line under a token is the colour of the expert that acted; an underlined bold one is not the large \
         model’s choice. Arrow keys walk.</p><div id=\"detail\" aria-live=\"polite\"></div><main>{body}</main>\
         <script>{SCRIPT}</script></body></html>\n"
    )
}

fn detail(record: &Record) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "–".into(), |value| format!("{value:.4e}"));
    let large = record.argmax_large.map_or_else(|| "–".into(), |id| id.to_string());
    format!(
        "step {}: {}\nexpert {}, α {:?}\nloss {}\nKL(P̃‖P) {} (targets {:.4?}), KL(P‖P̃) {} (targets {:.4?})\n\
         own choice, token ids: large {large}, experts {:?}",
        record.step,
        record.shown(),
        record.expert.as_deref().unwrap_or("–"),
        record.alpha,
        number(record.loss),
        number(record.kl_fused_large),
        record.kl_expert_small,
        number(record.kl_large_fused),
        record.kl_small_expert,
        record.argmax_expert,
    )
}
