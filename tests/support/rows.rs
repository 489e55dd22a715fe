//! Random rows of logits.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use dlf_engine::fusion::Logits;

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
    /// Student's t with two degrees of freedom, cut at ±60.
    pub fn heavy(&mut self) -> f64 {
        let u = 2.0 * self.uniform() - 1.0;
        (u * (2.0 / (1.0 - u * u)).sqrt()).clamp(-60.0, 60.0)
    }
}

/// The logits of one row.
#[derive(Clone, Debug)]
pub struct Row {
    pub large: Vec<f32>,
    pub small: Vec<f32>,
    pub experts: Vec<Vec<f32>>,
}

impl Row {
    /// A small model that resembles the large one, and experts that resemble the small one.
    pub fn random(rng: &mut Rng, width: usize, experts: usize, scale: f64, heavy: bool) -> Self {
        let mut draw = || if heavy { rng.heavy() } else { rng.normal() } * scale;
        let large: Vec<f64> = (0..width).map(|_| draw()).collect();
        let small: Vec<f64> = large.iter().map(|x| 0.7 * x + 0.5 * draw()).collect();
        let experts: Vec<Vec<f64>> =
            (0..experts).map(|_| small.iter().map(|x| x + 0.4 * draw()).collect()).collect();
        let round = |x: &Vec<f64>| x.iter().map(|x| x.clamp(-1e4, 1e4) as f32).collect();
        Self { large: round(&large), small: round(&small), experts: experts.iter().map(round).collect() }
    }

    pub fn logits(&self) -> Logits<'_> {
        Logits {
            large: Some(&self.large),
            small: Some(&self.small),
            experts: self.experts.iter().map(Vec::as_slice).collect(),
        }
    }

    pub fn models(&mut self) -> Vec<&mut Vec<f32>> {
        [&mut self.large, &mut self.small].into_iter().chain(&mut self.experts).collect()
    }
}

/// How the logits of a model are spread.
#[derive(Clone, Copy, Debug)]
pub enum Tail {
    Normal,
    Student,
    Cauchy,
    LogNormal,
    Spikes,
    TwoModes,
}

impl Tail {
    pub const ALL: [Self; 6] =
        [Self::Normal, Self::Student, Self::Cauchy, Self::LogNormal, Self::Spikes, Self::TwoModes];

    fn draw(self, rng: &mut Rng) -> f64 {
        let sign = |rng: &mut Rng| if rng.below(2) == 0 { 1.0 } else { -1.0 };
        match self {
            Self::Normal => rng.normal(),
            Self::Student => rng.heavy(),
            Self::Cauchy => (std::f64::consts::PI * (rng.uniform() - 0.5)).tan().clamp(-100.0, 100.0),
            Self::LogNormal => sign(rng) * (1.2 * rng.normal()).exp().min(100.0),
            Self::Spikes => rng.normal() * if rng.below(50) == 0 { 15.0 } else { 0.3 },
            Self::TwoModes => rng.normal() + 4.0 * sign(rng),
        }
    }
}

/// What the models of a row have in common.
#[derive(Clone, Copy, Debug)]
pub enum Relation {
    /// The small model resembles the large one, and the experts the small one.
    Alike,
    /// And the large one is sure of a token.
    Sure,
    /// The small model is like no other.
    StrangeSmall,
    /// The experts differ from the small model in a few tokens.
    RareChanges,
    /// The experts hardly differ from the small model.
    NearlyEqual,
    /// The experts are like no other.
    StrangeExperts,
}

impl Relation {
    pub const ALL: [Self; 6] = [
        Self::Alike,
        Self::Sure,
        Self::StrangeSmall,
        Self::RareChanges,
        Self::NearlyEqual,
        Self::StrangeExperts,
    ];

    fn expert(self, rng: &mut Rng, small: &[f64], scale: f64, tail: Tail) -> Vec<f64> {
        let mut near = |part: f64| small.iter().map(|x| x + part * scale * tail.draw(rng)).collect();
        match self {
            Self::NearlyEqual => near(0.02),
            Self::StrangeExperts => small.iter().map(|_| scale * tail.draw(rng)).collect(),
            Self::RareChanges => {
                let mut expert = small.to_vec();
                for _ in 0..1 + small.len() / 20 {
                    expert[rng.below(small.len())] += 2.0 * scale * tail.draw(rng);
                }
                expert
            }
            _ => near(0.4),
        }
    }
}

impl Row {
    /// One whose large model, small model and experts have these tails.
    pub fn of_kind(
        rng: &mut Rng,
        width: usize,
        experts: usize,
        scale: f64,
        [large_tail, small_tail, expert_tail]: [Tail; 3],
        relation: Relation,
    ) -> Self {
        let mut large: Vec<f64> = (0..width).map(|_| scale * large_tail.draw(rng)).collect();
        if matches!(relation, Relation::Sure) {
            large[rng.below(width)] += 10.0 + 20.0 * rng.uniform();
        }
        let part = if matches!(relation, Relation::StrangeSmall) { (0.0, 1.0) } else { (0.7, 0.5) };
        let small: Vec<f64> =
            large.iter().map(|x| part.0 * x + part.1 * scale * small_tail.draw(rng)).collect();
        let round = |x: &[f64]| x.iter().map(|&x| x as f32).collect();
        let experts = (0..experts).map(|_| round(&relation.expert(rng, &small, scale, expert_tail)));
        Self { experts: experts.collect(), large: round(&large), small: round(&small) }
    }
}
