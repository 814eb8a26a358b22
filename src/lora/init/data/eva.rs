//! EVA (arXiv:2410.07170): A starts as the principal directions of a layer's
//! inputs, and ranks go where they explain most of the inputs' variance.
//!
//! The directions are found batch by batch, by an incremental principal
//! component analysis (Ross et al., "Incremental learning for robust visual
//! tracking", section 3), until they turn no further.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// PEFT's `eva_config`.
///
/// ```
/// use tch_peft::{EvaConfig, InitLoraWeights, LoraConfig};
///
/// let config = LoraConfig::builder()
///     .target_modules(["q_proj"])
///     .init_lora_weights(InitLoraWeights::Eva)
///     .eva_config(EvaConfig { rho: 1.0, ..EvaConfig::default() }) // all ranks as asked for
///     .build()?; // for `LoraModel::wrap_with_data`
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaConfig {
    /// A layer's rank is at most this many times what was asked for; at least 1.
    pub rho: f64,
    /// The cosine between a direction and what it was a batch before from
    /// which on it counts as found.
    pub tau: f64,
    /// Kept for PEFT: here the caller says which positions count.
    pub use_label_mask: bool,
    /// Kept for PEFT.
    pub label_mask_value: i64,
    /// Whether each direction is divided by the root of its singular value.
    pub whiten: bool,
    /// Whether alpha grows with a layer's rank, so that the scale stays.
    pub adjust_scaling_factors: bool,
}

impl Default for EvaConfig {
    fn default() -> Self {
        EvaConfig {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            label_mask_value: -100,
            whiten: false,
            adjust_scaling_factors: true,
        }
    }
}

impl EvaConfig {
    pub(crate) fn validate(self) -> Result<Self> {
        if self.rho.is_nan() || self.rho < 1.0 {
            return Err(Error::config("eva_config", "a rho of at least 1", self.rho));
        }
        if !(0.0..=1.0).contains(&self.tau) {
            return Err(Error::config("eva_config", "a tau in [0, 1]", self.tau));
        }
        Ok(self)
    }
}

/// The analysis of all layers.
#[derive(Debug)]
pub(crate) struct Eva {
    config: EvaConfig,
    pub(crate) layers: Vec<EvaLayer>,
    /// The sum of the ranks that were asked for.
    budget: usize,
}

/// The analysis of one layer.
#[derive(Debug)]
pub(crate) struct EvaLayer {
    pub(crate) path: String,
    /// Directions that are followed.
    components: i64,
    analysis: Option<Analysis>,
    /// Which directions turn no further.
    found: Vec<bool>,
    /// The rank that it would get now.
    pub(crate) rank: usize,
}

/// The state of an incremental analysis, in f64.
#[derive(Debug)]
struct Analysis {
    /// (k, in), of falling variance.
    directions: Tensor,
    /// (k)
    singular: Tensor,
    /// (in)
    mean: Tensor,
    /// The sum of the squares of all values, each column about its mean.
    scatter: f64,
    rows: i64,
}

impl Eva {
    /// For layers of these paths, features and ranks.
    pub(crate) fn new(config: EvaConfig, layers: impl IntoIterator<Item = (String, i64, i64)>) -> Result<Self> {
        let config = config.validate()?;
        let mut eva = Eva { config, layers: Vec::new(), budget: 0 };
        for (path, inn, r) in layers {
            let components = (r as f64 * config.rho).round_ties_even() as i64;
            if components > inn {
                let expected = format!("a rho for which rho · r is at most the {inn} features of {path}");
                return Err(Error::config("eva_config", expected, config.rho));
            }
            let found = vec![false; components as usize];
            eva.layers.push(EvaLayer { path, components, analysis: None, found, rank: components as usize });
            eva.budget += r as usize;
        }
        Ok(eva)
    }

    /// Whether all directions that ranks go to are found.
    pub(crate) fn done(&self) -> bool {
        self.layers.iter().all(EvaLayer::done)
    }

    /// Gives the ranks to the directions that explain most, once there are any.
    pub(crate) fn distribute(&mut self) -> Result<()> {
        let mut shares: Vec<(usize, f64)> = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let Some(analysis) = &layer.analysis else { return Ok(()) };
            let variances = Vec::<f64>::try_from(analysis.singular.f_square()?)?;
            shares.extend(variances.into_iter().map(|variance| (i, variance / analysis.scatter)));
        }
        // Stable, so that the same data gives the same ranks.
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        for layer in &mut self.layers {
            layer.rank = 0;
        }
        for (i, _) in shares.into_iter().take(self.budget) {
            self.layers[i].rank += 1;
        }
        Ok(())
    }

    /// A (rank, in) of a layer.
    pub(crate) fn directions(&self, layer: &EvaLayer) -> Result<Option<Tensor>> {
        let Some(analysis) = &layer.analysis else { return Ok(None) };
        let rank = layer.rank as i64;
        let directions = analysis.directions.f_narrow(0, 0, rank)?;
        if !self.config.whiten {
            return Ok(Some(directions));
        }
        let roots = analysis.singular.f_narrow(0, 0, rank)?.f_sqrt()?.f_unsqueeze(1)?;
        Ok(Some(directions.f_div(&roots)?))
    }
}

impl EvaLayer {
    /// Whether the directions that its rank goes to are found.
    pub(crate) fn done(&self) -> bool {
        self.found.iter().take(self.rank).all(|found| *found)
    }

    /// Rows that a batch must have at least.
    pub(crate) fn components(&self) -> i64 {
        self.components
    }

    /// Whether any batch was large enough.
    pub(crate) fn has_seen(&self) -> bool {
        self.analysis.is_some()
    }

    /// Takes rows (n, in) in; fewer than there are directions say too little,
    /// and are left out.
    pub(crate) fn add(&mut self, rows: &Tensor, tau: f64) -> Result<()> {
        if rows.size()[0] < self.components {
            return Ok(());
        }
        let next = Analysis::fit(self.analysis.as_ref(), &rows.f_to_kind(Kind::Double)?, self.components)?;
        if let Some(before) = &self.analysis {
            let cosines =
                next.directions.f_mul(&before.directions)?.f_sum_dim_intlist([1i64].as_slice(), false, None)?;
            self.found = Vec::<f64>::try_from(cosines)?.into_iter().map(|cosine| cosine >= tau).collect();
        }
        self.analysis = Some(next);
        Ok(())
    }
}

impl Analysis {
    /// Of the rows so far and these.
    fn fit(before: Option<&Analysis>, rows: &Tensor, components: i64) -> Result<Self> {
        let n = rows.size()[0];
        let over_rows = |t: &Tensor| t.f_mean_dim([0i64].as_slice(), false, Kind::Double);
        let batch_mean = over_rows(rows)?;
        let centred = rows.f_sub(&batch_mean)?;
        let scatter = |t: &Tensor| -> Result<f64> { Ok(f64::try_from(t.f_square()?.f_sum(Kind::Double)?)?) };
        let (stacked, mean, total, seen) = match before {
            None => (centred.shallow_clone(), batch_mean, scatter(&centred)?, n),
            Some(before) => {
                let seen = before.rows + n;
                let shift = before.mean.f_sub(&batch_mean)?;
                let weight = before.rows as f64 * n as f64 / seen as f64;
                let correction = shift.f_mul_scalar(weight.sqrt())?;
                let old = before.directions.f_mul(&before.singular.f_unsqueeze(1)?)?;
                let stacked = Tensor::f_cat(&[old, centred.shallow_clone(), correction.f_unsqueeze(0)?], 0)?;
                let mean = batch_mean.f_add(&shift.f_mul_scalar(before.rows as f64 / seen as f64)?)?;
                (stacked, mean, before.scatter + scatter(&centred)? + scatter(&correction)?, seen)
            }
        };
        let (_, singular, v) = stacked.f_svd(true, true)?;
        let kept = components.min(singular.size()[0]);
        let directions = v.f_tr()?.f_narrow(0, 0, kept)?;
        // Signs: the largest value of each direction is positive, as in PEFT.
        let largest = directions.f_abs()?.f_argmax(1, true)?;
        let directions = directions.f_mul(&directions.f_gather(1, &largest, false)?.f_sign()?)?.f_contiguous()?;
        Ok(Analysis { directions, singular: singular.f_narrow(0, 0, kept)?, mean, scatter: total, rows: seen })
    }
}
