//! The Porter stemmer as NLTK has it, with NLTK's extensions: what `rouge-score` stems with.
//!
//! M. F. Porter, *An algorithm for suffix stripping*, 1980. Words are lower-case ASCII, as ROUGE's tokens are.

/// Words that no rule gets right, by their stem.
const IRREGULAR: [(&str, &[&str]); 12] = [
    ("sky", &["sky", "skies"]),
    ("die", &["dying"]),
    ("lie", &["lying"]),
    ("tie", &["tying"]),
    ("news", &["news"]),
    ("inning", &["innings", "inning"]),
    ("outing", &["outings", "outing"]),
    ("canning", &["cannings", "canning"]),
    ("howe", &["howe"]),
    ("proceed", &["proceed"]),
    ("exceed", &["exceed"]),
    ("succeed", &["succeed"]),
];

/// A suffix and what takes its place; the first whose suffix fits is the only one tried.
type Rule = (&'static str, &'static str);

const STEP_TWO: [Rule; 20] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
];

const STEP_THREE: [Rule; 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];

const STEP_FOUR: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism",
    "ate", "iti", "ous", "ive", "ize",
];

/// The stem of a word of lower-case ASCII letters and digits; other words are given back as they are.
pub fn stem(word: &str) -> String {
    if !word.is_ascii() || word.len() <= 2 {
        return word.to_owned();
    }
    if let Some((stem, _)) = IRREGULAR.iter().find(|(_, words)| words.contains(&word)) {
        return (*stem).to_owned();
    }
    let word = past_and_participle(plural(word));
    let word = step_two(final_y(word));
    let word = apply(word, &STEP_THREE, |stem| measure(stem) > 0);
    double_l(final_e(step_four(word)))
}

/// Which letters are consonants: all but a, e, i, o, u, and a y after a consonant.
fn consonants(word: &str) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for letter in word.bytes() {
        flags.push(match letter {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => flags.last().is_none_or(|&before| !before),
            _ => true,
        });
    }
    flags
}

/// m of \[C\](VC)^m\[V\]: how often a consonant follows a vowel.
fn measure(stem: &str) -> usize {
    consonants(stem).windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

fn has_vowel(stem: &str) -> bool {
    consonants(stem).contains(&false)
}

/// *d: two equal consonants at the end.
fn ends_double_consonant(word: &str) -> bool {
    let letters = word.as_bytes();
    letters.len() >= 2
        && letters[letters.len() - 1] == letters[letters.len() - 2]
        && consonants(word).last() == Some(&true)
}

/// *o: consonant, vowel, consonant other than w, x, y at the end; NLTK also takes a word of vowel and consonant.
fn ends_cvc(word: &str) -> bool {
    match consonants(word)[..] {
        [false, true] => true,
        [.., true, false, true] => !word.ends_with(['w', 'x', 'y']),
        _ => false,
    }
}

/// The first rule whose suffix the word has, where `condition` holds for what stands before it.
fn apply(word: String, rules: &[Rule], condition: impl Fn(&str) -> bool) -> String {
    for (suffix, replacement) in rules {
        if let Some(stem) = word.strip_suffix(suffix) {
            return if condition(stem) { format!("{stem}{replacement}") } else { word };
        }
    }
    word
}

/// Step 1a.
fn plural(word: &str) -> String {
    let rules: &[Rule] = if word.len() == 4 { &[("ies", "ie")] } else { &[] };
    let rules = [rules, &[("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")]].concat();
    apply(word.to_owned(), &rules, |_| true)
}

/// Step 1b.
fn past_and_participle(word: String) -> String {
    if let Some(stem) = word.strip_suffix("ied") {
        return format!("{stem}{}", if word.len() == 4 { "ie" } else { "i" });
    }
    if let Some(stem) = word.strip_suffix("eed") {
        return if measure(stem) > 0 { format!("{stem}ee") } else { word };
    }
    let stem =
        ["ed", "ing"].into_iter().find_map(|suffix| word.strip_suffix(suffix).filter(|s| has_vowel(s)));
    let Some(stem) = stem else { return word };
    if ["at", "bl", "iz"].into_iter().any(|end| stem.ends_with(end)) {
        return format!("{stem}e");
    }
    if ends_double_consonant(stem) {
        let single = if stem.ends_with(['l', 's', 'z']) { stem } else { &stem[..stem.len() - 1] };
        return single.to_owned();
    }
    if measure(stem) == 1 && ends_cvc(stem) { format!("{stem}e") } else { stem.to_owned() }
}

/// Step 1c: NLTK's y → i wants a consonant before it, and more than that.
fn final_y(word: String) -> String {
    match word.strip_suffix('y') {
        Some(stem) if stem.len() > 1 && consonants(stem).last() == Some(&true) => format!("{stem}i"),
        _ => word,
    }
}

fn step_two(word: String) -> String {
    if let Some(stem) = word.strip_suffix("alli").filter(|stem| measure(stem) > 0) {
        return step_two(format!("{stem}al"));
    }
    if STEP_TWO.iter().any(|(suffix, _)| word.ends_with(suffix)) {
        return apply(word, &STEP_TWO, |stem| measure(stem) > 0);
    }
    // NLTK counts the l of "logi" to the stem.
    match word.strip_suffix("logi") {
        Some(stem) if measure(&format!("{stem}l")) > 0 => format!("{stem}log"),
        Some(_) => word,
        None => apply(word, &[("fulli", "ful")], |stem| measure(stem) > 0),
    }
}

fn step_four(word: String) -> String {
    let Some((suffix, stem)) =
        STEP_FOUR.iter().find_map(|suffix| Some((*suffix, word.strip_suffix(suffix)?)))
    else {
        return word;
    };
    if measure(stem) > 1 && (suffix != "ion" || stem.ends_with(['s', 't'])) { stem.to_owned() } else { word }
}

/// Step 5a.
fn final_e(word: String) -> String {
    match word.strip_suffix('e') {
        Some(stem) if measure(stem) > 1 || (measure(stem) == 1 && !ends_cvc(stem)) => stem.to_owned(),
        _ => word,
    }
}

/// Step 5b.
fn double_l(word: String) -> String {
    match word.strip_suffix('l') {
        Some(stem) if stem.ends_with('l') && measure(stem) > 1 => stem.to_owned(),
        _ => word,
    }
}
