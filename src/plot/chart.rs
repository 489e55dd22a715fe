//! The charts of the page: α, the KL terms and the loss, one column a token.

use std::fmt::Write;

use super::palette::Palette;
use super::{Record, Text, escape, is_sum};

/// Room for the numbers of the vertical axis.
const AXIS: f64 = 48.0;
/// Between charts, with the lower one's title.
const GAP: f64 = 40.0;
const HEIGHT: f64 = 120.0;
/// Room for a token's text below the charts, and how many characters of it are shown.
const LABEL: (f64, usize) = (92.0, 11);
/// More decades than this below the highest value are drawn at the floor.
const DECADES: i32 = 8;

/// The width of a token's column, so that a short text isn't lost on a wide page, nor a long one unreadable.
fn pitch(tokens: usize) -> f64 {
    (840.0 / tokens.max(1) as f64).clamp(18.0, 36.0).floor()
}

/// A vertical axis: where values lie, and which ticks it has.
struct Scale {
    low: f64,
    high: f64,
    /// Values are powers of ten; what lies below the first is drawn there.
    log: bool,
    clamped: bool,
}

impl Scale {
    /// α from 0 to 2, or as far as it goes.
    fn alpha(values: &[f64]) -> Self {
        let low = values.iter().copied().fold(0.0, f64::min).floor();
        let high = values.iter().copied().fold(2.0, f64::max).ceil();
        Self { low, high, log: false, clamped: false }
    }

    /// Whole decades around what is above 0; `None` where nothing is.
    fn log(values: &[f64]) -> Option<Self> {
        let positive = || values.iter().copied().filter(|v| v.is_finite() && *v > 0.0);
        let high = positive().reduce(f64::max)?.log10().ceil();
        let lowest = positive().reduce(f64::min)?.log10().floor().min(high - 1.0);
        let low = lowest.max(high - f64::from(DECADES));
        let clamped = values.iter().any(|&v| v < 10f64.powf(low));
        Some(Self { low, high, log: true, clamped })
    }

    /// How far below the top a value lies.
    fn y(&self, value: f64) -> f64 {
        let value = if self.log { value.max(f64::MIN_POSITIVE).log10() } else { value };
        HEIGHT * (self.high - value.clamp(self.low, self.high)) / (self.high - self.low)
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        let span = self.high - self.low;
        let step = if self.log || span > 4.0 { (span / 4.0).ceil() } else { 0.5 };
        let mut ticks = Vec::new();
        let mut at = self.low;
        while at <= self.high + 1e-9 {
            let text = if self.log { power(at as i32) } else { format!("{at:.1}") };
            let below = if self.clamped && at == self.low { "≤" } else { "" };
            ticks.push((HEIGHT * (self.high - at) / span, format!("{below}{text}")));
            at += step;
        }
        ticks
    }
}

/// 10ⁿ.
fn power(n: i32) -> String {
    let raised = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        c => char::from_u32('⁰' as u32 + c.to_digit(10).unwrap_or(0)).unwrap_or(c),
    };
    format!("10{}", n.to_string().chars().map(raised).collect::<String>())
}

/// The charts of a text as they grow, downwards.
struct Charts {
    axis: String,
    plot: String,
    y: f64,
    width: f64,
    pitch: f64,
}

impl Charts {
    fn x(&self, index: usize) -> f64 {
        self.pitch * (index as f64 + 0.5)
    }

    /// Title, ticks and grid of the next chart.
    fn begin(&mut self, title: &str, scale: &Scale) {
        self.y += GAP;
        let y = self.y;
        // Writing into a string can't fail.
        let _ = write!(self.axis, "<text x=\"2\" y=\"{:.1}\" class=\"title\">{title}</text>", y - 14.0);
        for (down, text) in scale.ticks() {
            let (line, at, width) = (y + down, y + down + 4.0, self.width);
            let _ = write!(self.axis, "<text x=\"{:.1}\" y=\"{at:.1}\">{text}</text>", AXIS - 6.0);
            let _ = write!(self.plot, "<path d=\"M0 {line:.1}H{width:.1}\" class=\"grid\"/>");
        }
    }

    /// A line through the values that there are, broken where there are none.
    fn line(&mut self, class: &str, scale: &Scale, values: impl Iterator<Item = Option<f64>>) {
        let (mut path, mut open) = (String::new(), false);
        for (index, value) in values.enumerate() {
            let Some(value) = value.filter(|v| !v.is_nan()) else {
                open = false;
                continue;
            };
            let (x, y) = (self.x(index), self.y + scale.y(value));
            // With round ends, a line of no length is a dot.
            let command = if open { format!("L{x:.1} {y:.1}") } else { format!("M{x:.1} {y:.1}h0") };
            path.push_str(&command);
            open = true;
        }
        if !path.is_empty() {
            let _ = write!(self.plot, "<path d=\"{path}\" class=\"{class}\"/>");
        }
    }

    fn alpha(&mut self, text: &Text, palette: &Palette) {
        let values: Vec<f64> = text.records.iter().filter_map(Record::total_alpha).collect();
        if values.is_empty() {
            return;
        }
        let scale = Scale::alpha(&values);
        let several = is_sum(std::slice::from_ref(text));
        self.begin(if several { "α, summed over the experts" } else { "α, and which expert acted" }, &scale);
        self.line("thread", &scale, text.records.iter().map(Record::total_alpha));
        for (index, record) in text.records.iter().enumerate() {
            if let Some(alpha) = record.total_alpha() {
                let expert = palette.index(record.expert.as_deref());
                let path = Palette::marker(expert, (self.x(index), self.y + scale.y(alpha)), 5.0);
                let _ = write!(self.plot, "<path d=\"{path}\" class=\"mark {}\"/>", class(expert));
            }
        }
        self.y += HEIGHT;
    }

    /// A term that fusion reached and, thinly, what it aimed at: one target an expert.
    fn term(
        &mut self,
        title: &str,
        text: &Text,
        palette: &Palette,
        reached: fn(&Record) -> Option<f64>,
        targets: fn(&Record) -> &[f64],
    ) {
        let records = &text.records;
        if records.iter().all(|record| reached(record).is_none()) {
            return;
        }
        let all = records.iter().flat_map(|r| reached(r).into_iter().chain(targets(r).iter().copied()));
        let values: Vec<f64> = all.collect();
        let scale = Scale::log(&values).unwrap_or(Scale { low: -1.0, high: 0.0, log: true, clamped: true });
        self.begin(title, &scale);
        for t in 0..records.iter().map(|record| targets(record).len()).max().unwrap_or(0) {
            let expert = palette.index(Some(text.expert(t).as_str()));
            let class = format!("target {}", class(expert));
            self.line(&class, &scale, records.iter().map(|record| targets(record).get(t).copied()));
        }
        self.line("reached", &scale, records.iter().map(reached));
        self.y += HEIGHT;
    }

    fn labels(&mut self, text: &Text) {
        let y = self.y + 10.0;
        for (index, record) in text.records.iter().enumerate() {
            let shown = record.shown();
            let mut label: String = shown.chars().take(LABEL.1).collect();
            if shown.chars().count() > LABEL.1 {
                label.push('…');
            }
            let changed = if record.changed == Some(true) { " class=\"changed\"" } else { "" };
            let (x, label) = (self.x(index) + 4.0, escape(&label));
            let _ = write!(
                self.plot,
                "<text transform=\"translate({x:.1} {y:.1})rotate(-90)\"{changed}>{label}</text>"
            );
        }
        self.y = y + LABEL.0;
    }
}

/// The style of what belongs to an expert.
pub(super) fn class(expert: Option<usize>) -> String {
    expert.map_or_else(|| "none".into(), |index| format!("e{index}"))
}

/// The charts of one text, whose first token is the page's `first`; empty where the method has no α and no KL terms.
pub(super) fn charts(text: &Text, palette: &Palette, first: usize) -> String {
    let pitch = pitch(text.records.len());
    let width = pitch * text.records.len() as f64;
    let mut charts = Charts { axis: String::new(), plot: String::new(), y: -10.0, width, pitch };
    charts.alpha(text, palette);
    charts.term(
        "KL(fused‖large), thin: KL(expert‖small), its target; nats",
        text,
        palette,
        |record| record.kl_fused_large,
        |record| &record.kl_expert_small,
    );
    charts.term(
        "KL(large‖fused), thin: KL(small‖expert), its target; nats",
        text,
        palette,
        |record| record.kl_large_fused,
        |record| &record.kl_small_expert,
    );
    charts.term("loss, nats²", text, palette, |record| record.loss, |_| &[]);
    if charts.plot.is_empty() {
        return String::new();
    }
    let bottom = charts.y;
    charts.labels(text);
    let Charts { axis, plot, y: height, .. } = charts;
    format!(
        "<div class=\"charts\"><svg class=\"axis\" width=\"{AXIS}\" height=\"{height}\" aria-hidden=\"true\">{axis}</svg>\
         <div class=\"scroll\" tabindex=\"-1\"><svg width=\"{width}\" height=\"{height}\" data-first=\"{first}\" \
         data-pitch=\"{pitch}\" role=\"img\" aria-label=\"α, the KL terms and the loss of every token\">\
         <rect class=\"cursor\" y=\"20\" width=\"{pitch}\" height=\"{:.1}\"/>{plot}</svg></div></div>",
        bottom - 10.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_where_the_axes_say() {
        let alpha = Scale::alpha(&[0.5, 1.9]);
        assert_eq!((alpha.y(0.0), alpha.y(0.5), alpha.y(2.0)), (120.0, 90.0, 0.0));
        assert_eq!(Scale::alpha(&[3.5]).high, 4.0);
        // 10⁻³ to 10⁰: 40 units a decade, by hand.
        let log = Scale::log(&[0.002, 0.5]).unwrap_or_else(|| unreachable!());
        assert!(
            (log.y(0.1) - 40.0).abs() < 1e-9 && (log.y(0.001) - 120.0).abs() < 1e-9,
            "exact but for log10"
        );
        assert_eq!(
            log.ticks().iter().map(|t| t.1.as_str()).collect::<Vec<_>>(),
            ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]
        );
        assert!(Scale::log(&[0.0, -1e-17]).is_none());
    }

    #[test]
    fn what_is_below_the_floor_lies_on_it_and_says_so() {
        let log = Scale::log(&[0.0, 1e-12, 0.5]).unwrap_or_else(|| unreachable!());
        assert_eq!((log.low, log.high, log.y(0.0), log.y(1e-12)), (-8.0, 0.0, 120.0, 120.0));
        assert_eq!(log.ticks()[0].1, "≤10⁻⁸");
    }
}
