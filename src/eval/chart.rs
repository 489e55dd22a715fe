//! The paper's figure 2 as SVG: the score of static fusion against α, and the dynamic rule's as a line across.

use std::fmt::Write as _;

/// One value of α.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// α.
    pub alpha: f64,
    /// The score and its 95 % interval, from 0 to 1.
    pub score: [f64; 3],
}

/// A chart: `score` arrays are the score, the lower and the upper end of its interval.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// What the vertical axis shows.
    pub metric: String,
    /// Static fusion, α increasing.
    pub points: Vec<Point>,
    /// The dynamic rule.
    pub dynamic: [f64; 3],
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;

impl Chart {
    /// The picture: one SVG document with no outside link, light and dark by the viewer's choice.
    pub fn svg(&self) -> String {
        let (first, last) = match (self.points.first(), self.points.last()) {
            (Some(first), Some(last)) if last.alpha > first.alpha => (first.alpha, last.alpha),
            (Some(only), _) => (only.alpha - 0.5, only.alpha + 0.5),
            _ => (0.0, 1.0),
        };
        let highs = self.points.iter().map(|point| point.score[2]).chain([self.dynamic[2]]);
        let (unit, top) = scale(highs.fold(0.0, f64::max));
        let x = |alpha: f64| LEFT + (alpha - first) / (last - first) * (WIDTH - LEFT - RIGHT);
        let y = |score: f64| HEIGHT - BOTTOM - score / top * (HEIGHT - TOP - BOTTOM);
        let mut svg = String::new();
        let mut line = |text: String| {
            svg.push_str(&text);
            svg.push('\n');
        };
        line(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(&self.description())
        ));
        line(STYLE.to_owned());
        line(format!("<rect class=\"page\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>"));
        line(format!("<text class=\"title\" x=\"{LEFT}\" y=\"24\">{}</text>", escape(&self.title)));
        for tick in 0..=((top / unit).round() as usize) {
            let score = tick as f64 * unit;
            let at = y(score);
            line(format!("<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/>", WIDTH - RIGHT));
            line(format!(
                "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT - 8.0,
                at + 4.0,
                short(100.0 * score)
            ));
        }
        // Labels of at most about ten values: more would run into each other.
        let every = self.points.len().div_ceil(11).max(1);
        for point in self.points.iter().step_by(every) {
            line(format!(
                "<text class=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x(point.alpha),
                HEIGHT - BOTTOM + 18.0,
                short(point.alpha)
            ));
        }
        line(format!(
            "<text class=\"middle\" x=\"{:.1}\" y=\"{:.1}\">α</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 12.0
        ));
        line(format!(
            "<text class=\"middle\" transform=\"translate(16 {:.1}) rotate(-90)\">{} %</text>",
            (TOP + HEIGHT - BOTTOM) / 2.0,
            escape(&self.metric)
        ));
        let [score, low, high] = self.dynamic;
        line(format!(
            "<rect class=\"band\" x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
            y(high),
            WIDTH - LEFT - RIGHT,
            y(low) - y(high)
        ));
        line(format!(
            "<path class=\"dynamic\" d=\"M{LEFT} {:.1}H{:.1}\"><title>dynamic: {}</title></path>",
            y(score),
            WIDTH - RIGHT,
            short(100.0 * score)
        ));
        let mut path = String::new();
        for (k, point) in self.points.iter().enumerate() {
            let command = if k == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{command}{:.1} {:.1}", x(point.alpha), y(point.score[0]));
        }
        line(format!("<path class=\"static\" d=\"{path}\"/>"));
        for Point { alpha, score: [score, low, high] } in &self.points {
            line(format!(
                "<path class=\"whisker\" d=\"M{0:.1} {1:.1}V{2:.1}\"/><circle cx=\"{0:.1}\" cy=\"{3:.1}\" r=\"3.5\"><title>static α = {4}: {5}</title></circle>",
                x(*alpha),
                y(*low),
                y(*high),
                y(*score),
                short(*alpha),
                short(100.0 * score)
            ));
        }
        line(LEGEND.to_owned());
        line("</svg>".to_owned());
        svg
    }

    /// The chart in words.
    fn description(&self) -> String {
        let best = self.points.iter().max_by(|a, b| a.score[0].total_cmp(&b.score[0]));
        let best = best.map_or(String::new(), |best| {
            format!(
                "; static fusion is best at α = {} with {}",
                short(best.alpha),
                short(100.0 * best.score[0])
            )
        });
        format!(
            "{}: {} % against α. Dynamic: {}{best}.",
            self.title,
            self.metric,
            short(100.0 * self.dynamic[0])
        )
    }
}

const STYLE: &str = "<style>text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}\
.end{text-anchor:end}.middle{text-anchor:middle}.page{fill:#fff}.grid{stroke:#d1d9e0;fill:none}\
.static,.whisker{stroke:#0969da;fill:none}.static{stroke-width:2}.whisker{opacity:.45}circle{fill:#0969da}\
.dynamic{stroke:#bc4c00;stroke-width:2;stroke-dasharray:7 4;fill:none}.band{fill:#bc4c00;opacity:.14}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.grid{stroke:#30363d}\
.static,.whisker{stroke:#58a6ff}circle{fill:#58a6ff}.dynamic{stroke:#f0883e}.band{fill:#f0883e}}</style>";

const LEGEND: &str = "<path class=\"static\" d=\"M410 20h24\"/><text x=\"440\" y=\"24\">static</text>\
<path class=\"dynamic\" d=\"M500 20h24\"/><text x=\"530\" y=\"24\">dynamic</text>";

/// The step between ticks and the upper end of an axis from 0 that holds `most`: 1, 2 or 5 times a power of ten.
fn scale(most: f64) -> (f64, f64) {
    let most = most.clamp(0.001, 1.0);
    let rough = most / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let unit = [1.0, 2.0, 5.0, 10.0].into_iter().map(|k| k * power).find(|unit| *unit >= rough * 0.999);
    let unit = unit.unwrap_or(rough);
    (unit, unit * (most / unit - 1e-9).ceil())
}

/// At most two decimals, without zeros at the end.
fn short(x: f64) -> String {
    let text = format!("{x:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_on_round_numbers() {
        let near = |(unit, top): (f64, f64), (u, t): (f64, f64)| {
            // Powers of ten have an error of some units in the last place.
            assert!((unit - u).abs() < 1e-12 && (top - t).abs() < 1e-12, "{unit} {top}");
        };
        near(scale(0.93), (0.2, 1.0));
        near(scale(0.47), (0.1, 0.5));
        near(scale(0.12), (0.05, 0.15));
        near(scale(1.0), (0.2, 1.0));
    }

    #[test]
    fn points_stand_where_their_scores_are() {
        let point = |alpha, score: f64| Point { alpha, score: [score, score - 0.1, score + 0.1] };
        let chart = Chart {
            title: "a < b".to_owned(),
            metric: "exact_match".to_owned(),
            points: vec![point(0.0, 0.2), point(1.0, 0.6), point(2.0, 0.4)],
            dynamic: [0.5, 0.4, 0.6],
        };
        let svg = chart.svg();
        // The axis goes to 0.8 over 304 units from y = 348 up; α from 0 to 2 over 560 from x = 64 on.
        assert!(svg.contains("d=\"M64.0 272.0L344.0 120.0L624.0 196.0\""), "{svg}");
        assert!(svg.contains("class=\"dynamic\" d=\"M64 158.0H624.0\""), "{svg}");
        assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
        assert!(!svg.contains("href") && !svg.contains("NaN"));
    }
}
