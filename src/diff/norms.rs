//! Sums that do not depend on how the work was cut up.

/// Elements of one piece: what is summed by one thread before it is added to the rest.
pub(super) const PIECE: usize = 1 << 15;

/// Sums over pairs of numbers.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Sums {
    /// Sum of `a * a`.
    pub(super) aa: f64,
    /// Sum of `b * b`.
    pub(super) bb: f64,
    /// Sum of `a * b`.
    pub(super) ab: f64,
    /// Largest `|a - b|`.
    pub(super) largest: f64,
}

impl Sums {
    /// Adds a pair.
    pub(super) fn pair(&mut self, a: f64, b: f64) {
        self.aa += a * a;
        self.bb += b * b;
        self.ab += a * b;
        self.largest = self.largest.max((a - b).abs());
    }

    /// Adds the sums of what comes next.
    pub(super) fn add(&mut self, next: &Self) {
        self.aa += next.aa;
        self.bb += next.bb;
        self.ab += next.ab;
        self.largest = self.largest.max(next.largest);
    }

    /// The cosine of the angle between all `a` and all `b`; none where one of them is all zero.
    pub(super) fn cosine(&self) -> Option<f64> {
        let norms = self.aa.sqrt() * self.bb.sqrt();
        (norms > 0.0).then(|| (self.ab / norms).clamp(-1.0, 1.0))
    }
}
