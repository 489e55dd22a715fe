//! Metrics: how right an answer is, from 0 to 1.

use serde::Deserialize;

use super::rouge::{rouge_l, rouge_n, tokenize};

/// What is measured of a sample.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Metric {
    /// The extracted answer is one of the references, to the letter.
    #[serde(rename = "exact_match")]
    ExactMatch,
    /// The same in TriviaQA's normal form: case, punctuation and articles don't count.
    #[serde(rename = "normalized_exact_match")]
    NormalizedExactMatch,
    /// ROUGE-1 F1; the best of the references, as for the other two.
    #[serde(rename = "rouge1")]
    Rouge1,
    /// ROUGE-2 F1.
    #[serde(rename = "rouge2")]
    Rouge2,
    /// ROUGE-L F1.
    #[serde(rename = "rougeL")]
    RougeL,
    /// The right choice has the highest log-likelihood; of equal ones the first counts.
    #[serde(rename = "acc")]
    Accuracy,
    /// The same with each log-likelihood divided by the choice's length in bytes.
    #[serde(rename = "acc_norm")]
    NormalizedAccuracy,
    /// TruthfulQA's mc1: the most likely choice is labelled true.
    #[serde(rename = "mc1")]
    Mc1,
    /// TruthfulQA's mc2: the share of the choices labelled true in the probability of all choices.
    #[serde(rename = "mc2")]
    Mc2,
}

impl Metric {
    /// As task files name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ExactMatch => "exact_match",
            Self::NormalizedExactMatch => "normalized_exact_match",
            Self::Rouge1 => "rouge1",
            Self::Rouge2 => "rouge2",
            Self::RougeL => "rougeL",
            Self::Accuracy => "acc",
            Self::NormalizedAccuracy => "acc_norm",
            Self::Mc1 => "mc1",
            Self::Mc2 => "mc2",
        }
    }

    /// Whether it compares choices; the others look at a text.
    pub fn is_of_choices(self) -> bool {
        matches!(self, Self::Accuracy | Self::NormalizedAccuracy | Self::Mc1 | Self::Mc2)
    }

    /// Whether a sample is right or wrong and nothing between.
    pub fn is_proportion(self) -> bool {
        !matches!(self, Self::Rouge1 | Self::Rouge2 | Self::RougeL | Self::Mc2)
    }

    /// The score of an extracted answer against references. 0 where there is no answer; 0 for metrics of choices.
    pub fn of_text(self, answer: Option<&str>, references: &[String], stem: bool) -> f64 {
        let Some(answer) = answer else { return 0.0 };
        let any = |right: &dyn Fn(&str) -> bool| f64::from(u8::from(references.iter().any(|r| right(r))));
        let best = |score: &dyn Fn(&[String], &[String]) -> f64| {
            let answer = tokenize(answer, stem);
            references.iter().map(|r| score(&tokenize(r, stem), &answer)).fold(0.0, f64::max)
        };
        match self {
            Self::ExactMatch => any(&|reference| reference.trim() == answer.trim()),
            Self::NormalizedExactMatch => {
                let answer = normalize(answer);
                any(&|reference| normalize(reference) == answer)
            }
            Self::Rouge1 => best(&|target, prediction| rouge_n(target, prediction, 1)),
            Self::Rouge2 => best(&|target, prediction| rouge_n(target, prediction, 2)),
            Self::RougeL => best(&rouge_l),
            Self::Accuracy | Self::NormalizedAccuracy | Self::Mc1 | Self::Mc2 => 0.0,
        }
    }

    /// The score of choices by their log-likelihoods; `bytes` are their lengths, `right` their labels, all of one
    /// length. 0 for metrics of text.
    pub fn of_choices(self, logprobs: &[f64], bytes: &[usize], right: &[bool]) -> f64 {
        let chosen = |scores: &[f64]| {
            let best = argmax(scores).and_then(|best| right.get(best));
            f64::from(u8::from(best == Some(&true)))
        };
        match self {
            Self::Accuracy | Self::Mc1 => chosen(logprobs),
            Self::NormalizedAccuracy => {
                let by_byte =
                    logprobs.iter().zip(bytes).map(|(logprob, &bytes)| logprob / bytes.max(1) as f64);
                chosen(&by_byte.collect::<Vec<_>>())
            }
            Self::Mc2 => {
                // Relative to the largest, so that none underflows that matters.
                let most = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weight = |&logprob: &f64| if logprob == most { 1.0 } else { (logprob - most).exp() };
                let all: f64 = logprobs.iter().map(weight).sum();
                let of_right: f64 =
                    logprobs.iter().zip(right).filter(|(_, right)| **right).map(|(l, _)| weight(l)).sum();
                of_right / all.max(f64::MIN_POSITIVE)
            }
            _ => 0.0,
        }
    }
}

/// The first of the largest.
pub(super) fn argmax(scores: &[f64]) -> Option<usize> {
    scores.iter().enumerate().fold(None, |best: Option<usize>, (k, score)| match best {
        Some(best) if scores.get(best) >= Some(score) => Some(best),
        _ => Some(k),
    })
}

/// TriviaQA's normal form: lower case, no punctuation, no articles, single spaces.
pub(super) fn normalize(text: &str) -> String {
    let lower = text.to_lowercase();
    let is_punctuation = |c: char| c.is_ascii_punctuation() || "‘’´`".contains(c);
    let words = lower.split(|c: char| c.is_whitespace() || is_punctuation(c));
    let words = words.filter(|word| !matches!(*word, "" | "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn exact_match_takes_any_reference_and_ignores_nothing_inside() {
        let references = strings(&["Paris", "City of Light"]);
        let score = |answer| Metric::ExactMatch.of_text(Some(answer), &references, false);
        assert_eq!(score(" Paris "), 1.0);
        assert_eq!(score("City of Light"), 1.0);
        assert_eq!(score("paris"), 0.0);
        assert_eq!(Metric::ExactMatch.of_text(None, &references, false), 0.0);
    }

    #[test]
    fn normalized_exact_match_ignores_case_punctuation_and_articles() {
        let references = strings(&["The U.S. Open", "Rock_'n'_Roll"]);
        let score = |answer| Metric::NormalizedExactMatch.of_text(Some(answer), &references, false);
        assert_eq!(score("u s open!"), 1.0);
        assert_eq!(score("rock n roll"), 1.0);
        assert_eq!(score("us open"), 0.0, "punctuation is a space, as in TriviaQA's own script");
        assert_eq!(normalize("An apple, a day\n(the best)"), "apple day best");
        assert_eq!(normalize("theatre"), "theatre");
    }

    #[test]
    fn rouge_takes_the_best_reference() {
        // the cat sat / the cat: precision 1, recall 2/3, F1 4/5; against "dogs": 0.
        let references = strings(&["dogs", "the cat sat"]);
        let score = Metric::Rouge1.of_text(Some("the cat"), &references, false);
        assert!((score - 0.8).abs() < 1e-12, "rounding alone: {score}");
    }

    #[test]
    fn accuracy_by_likelihood_and_by_likelihood_a_byte() {
        // −4 beats −6; but −6 over 12 bytes beats −4 over 2.
        let (logprobs, bytes) = ([-4.0, -6.0], [2, 12]);
        assert_eq!(Metric::Accuracy.of_choices(&logprobs, &bytes, &[true, false]), 1.0);
        assert_eq!(Metric::Accuracy.of_choices(&logprobs, &bytes, &[false, true]), 0.0);
        assert_eq!(Metric::NormalizedAccuracy.of_choices(&logprobs, &bytes, &[true, false]), 0.0);
        assert_eq!(Metric::NormalizedAccuracy.of_choices(&logprobs, &bytes, &[false, true]), 1.0);
        let infinite = [f64::NEG_INFINITY; 2];
        assert_eq!(
            Metric::Accuracy.of_choices(&infinite, &bytes, &[true, false]),
            1.0,
            "the first of equals"
        );
    }

    #[test]
    fn mc1_and_mc2_by_hand() {
        let logprobs = [0.5f64.ln(), 0.2f64.ln(), 0.1f64.ln()];
        let right = [false, true, true];
        assert_eq!(Metric::Mc1.of_choices(&logprobs, &[1; 3], &right), 0.0);
        let mc2 = Metric::Mc2.of_choices(&logprobs, &[1; 3], &right);
        assert!((mc2 - 0.3 / 0.8).abs() < 1e-12, "rounding alone: {mc2}");
        // Far below what exp can hold.
        let far = [-2000.0, -2000.0 + 3f64.ln()];
        let mc2 = Metric::Mc2.of_choices(&far, &[1; 2], &[false, true]);
        assert!((mc2 - 0.75).abs() < 1e-9, "2000 has 2e-13 of rounding: {mc2}");
    }
}
