//! ROUGE as the Python package `rouge-score` computes it: F1 over n-grams, or over the longest common subsequence.

use std::collections::HashMap;

use super::porter;

/// A text's tokens: lower case, runs of a–z and 0–9; with `stem`, words of more than three letters are stemmed.
pub fn tokenize(text: &str, stem: bool) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    words
        .filter(|word| !word.is_empty())
        .map(|word| if stem && word.len() > 3 { porter::stem(word) } else { word.to_owned() })
        .filter(|word| !word.is_empty())
        .collect()
}

/// ROUGE-n: F1 of the n-grams of two token lists, each counted as often as it stands in both; `n` is at least 1.
pub fn rouge_n(target: &[String], prediction: &[String], n: usize) -> f64 {
    let n = n.max(1);
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    for ngram in target.windows(n) {
        *counts.entry(ngram).or_default() += 1;
    }
    let mut common = 0;
    for ngram in prediction.windows(n) {
        if let Some(left) = counts.get_mut(ngram).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    let grams = |tokens: &[String]| (tokens.len() + 1).saturating_sub(n);
    f1(common, grams(target), grams(prediction))
}

/// ROUGE-L: F1 of the longest common subsequence of two token lists.
pub fn rouge_l(target: &[String], prediction: &[String]) -> f64 {
    // One row of the table at a time: `lengths[j]` is that of target[..i] and prediction[..j].
    let mut lengths = vec![0; prediction.len() + 1];
    for word in target {
        let mut diagonal = 0;
        for (j, other) in prediction.iter().enumerate() {
            let above = lengths[j + 1];
            lengths[j + 1] = if word == other { diagonal + 1 } else { above.max(lengths[j]) };
            diagonal = above;
        }
    }
    f1(lengths[prediction.len()], target.len(), prediction.len())
}

fn f1(common: usize, target: usize, prediction: usize) -> f64 {
    // The package divides by at least one n-gram.
    let precision = common as f64 / prediction.max(1) as f64;
    let recall = common as f64 / target.max(1) as f64;
    if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}
