//! From a generated text to the answer in it.

use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

/// proxy-tuning's number: a sign counts only before a decimal point.
#[allow(clippy::expect_used, reason = "a constant, compiled by every test of it")]
static NUMBER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"[-+]?[0-9]*\.[0-9]+|[0-9]+").expect("a constant regex"));

/// A comma between digits, which groups thousands.
#[allow(clippy::expect_used, reason = "a constant, compiled by every test of it")]
static GROUPED: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"([0-9]),([0-9])").expect("a constant regex"));

/// How the answer is found in a text. What is found has no white space around it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extract {
    /// All of it.
    #[default]
    Whole,
    /// The first line that isn't blank.
    FirstLine,
    /// The last number, thousands ungrouped: `[-+]?\d*\.\d+|\d+` after `1,000` became `1000`, as proxy-tuning has it.
    LastNumber,
    /// The first character that isn't white space, where it is one of A to Z.
    FirstLetter,
    /// What follows the last occurrence of a mark.
    After(String),
    /// The first match of a regular expression: its first group where it has one, else all of it.
    FirstMatch(#[serde(deserialize_with = "regex")] Regex),
    /// The last match.
    LastMatch(#[serde(deserialize_with = "regex")] Regex),
}

fn regex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Regex, D::Error> {
    let text = String::deserialize(deserializer)?;
    Regex::new(&text).map_err(serde::de::Error::custom)
}

impl Extract {
    /// The answer in `text`, or `None` where there is none.
    pub fn apply(&self, text: &str) -> Option<String> {
        let found = match self {
            Self::Whole => text.to_owned(),
            Self::FirstLine => text.lines().find(|line| !line.trim().is_empty())?.to_owned(),
            Self::LastNumber => {
                // Twice: matches don't overlap, so of 1,2,3 one pass leaves a comma.
                let once = GROUPED.replace_all(text, "$1$2");
                let text = GROUPED.replace_all(&once, "$1$2");
                NUMBER.find_iter(&text).last()?.as_str().to_owned()
            }
            Self::FirstLetter => {
                text.trim_start().chars().next().filter(char::is_ascii_uppercase)?.to_string()
            }
            Self::After(mark) => text.rsplit_once(mark.as_str())?.1.to_owned(),
            Self::FirstMatch(regex) => group(regex.captures(text)?)?,
            Self::LastMatch(regex) => group(regex.captures_iter(text).last()?)?,
        };
        let found = found.trim();
        (!found.is_empty()).then(|| found.to_owned())
    }
}

fn group(captures: regex::Captures<'_>) -> Option<String> {
    let group = if captures.len() > 1 { captures.get(1) } else { captures.get(0) };
    group.map(|group| group.as_str().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_finds_its_answer() {
        let regex = |pattern| Regex::new(pattern).unwrap();
        let cases: [(Extract, &str, Option<&str>); 21] = [
            (Extract::Whole, "  a b \n", Some("a b")),
            (Extract::Whole, " \n", None),
            (Extract::FirstLine, "\n  \n first \nsecond", Some("first")),
            (Extract::FirstLine, "", None),
            (Extract::LastNumber, "3 cats, 1,234,567 dogs.", Some("1234567")),
            (Extract::LastNumber, "1,2,3", Some("123")),
            (Extract::LastNumber, "a, 5", Some("5")),
            (Extract::LastNumber, "it is -2.50 now", Some("-2.50")),
            // The sign counts only with a decimal point: proxy-tuning's own expression.
            (Extract::LastNumber, "-7", Some("7")),
            (Extract::LastNumber, "$18.", Some("18")),
            (Extract::LastNumber, "none", None),
            (Extract::FirstLetter, " B. because", Some("B")),
            (Extract::FirstLetter, "b", None),
            (Extract::FirstLetter, "", None),
            (Extract::After("####".to_owned()), "#### 1\n#### 2 ", Some("2")),
            (Extract::After("####".to_owned()), "2", None),
            (Extract::After("####".to_owned()), "####", None),
            (Extract::FirstMatch(regex(r"x(\d)")), "x1 x2", Some("1")),
            (Extract::LastMatch(regex(r"x(\d)")), "x1 x2", Some("2")),
            (Extract::LastMatch(regex(r"x\d")), "x1 x2", Some("x2")),
            (Extract::FirstMatch(regex(r"x(\d)?")), "xx", None),
        ];
        for (rule, text, wanted) in cases {
            assert_eq!(rule.apply(text).as_deref(), wanted, "{rule:?} in {text:?}");
        }
    }
}
