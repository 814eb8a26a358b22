//! A first adapter that starts from data.

use super::adapter::{DEFAULT, Init, NamedAdapter};
use super::{LoraModel, targets};
use crate::base::{Adapter, Base, Site};
use crate::error::{Error, Result};
use crate::ffi::shared::SharedTensor;
use crate::lora::{
    Covariance, Eva, InitLoraWeights, LayerData, LayerForm, LayerPattern, LayerSettings, LoraConfig, Observer,
    Switches, TargetModules,
};
use std::collections::HashMap;
use std::sync::Arc;
use tch::Tensor;

/// Passes over the data after which directions that still turn are given up.
const MAX_PASSES: usize = 100;

impl<M> LoraModel<M> {
    /// [`LoraModel::wrap`] for the initialisations that start from data:
    ///
    /// - `eva` (arXiv:2410.07170) from the inputs of the adapted layers, over as
    ///   many passes over the batches as it takes. The ranks that it gives stand
    ///   in `rank_pattern` and `alpha_pattern` of the model's configuration, and
    ///   layers that get none are not adapted.
    /// - `corda` (arXiv:2406.05223) from their inputs in one pass.
    /// - `lora_ga` (arXiv:2407.05000) from the gradients of their weights in one
    ///   pass, summed over the batches.
    ///
    /// `step` runs the module on one batch: forward for `eva` and `corda`, with
    /// gradients off; forward and backward for `lora_ga`. It answers which
    /// positions of the inputs count, as a mask of their leading dimensions, or
    /// `None` for all; `lora_ga` takes no mask, as a loss has its own.
    ///
    /// The same base and batches give the same adapter. `corda` and `lora_ga`
    /// take it out of the base, which data alone can do again: to resume a run,
    /// make the model in the same way. [`LoraModel::save_pretrained`] writes
    /// such an adapter as plain LoRA of twice the rank for the base as it was,
    /// see [`LoraModel::save_as_lora`].
    ///
    /// ```no_run
    /// use tch::{Device, Kind, Tensor, nn, nn::Module};
    /// use tch_peft::{Base, InitLoraWeights, LoraConfig, LoraModel};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
    /// let batches = [Tensor::randn([128, 64], (Kind::Float, Device::Cpu))];
    /// let config = LoraConfig::builder().target_modules(["proj"]).init_lora_weights(InitLoraWeights::Corda).build()?;
    /// let model = LoraModel::wrap_with_data(Base::new(vs, net), config, &batches, |net, batch| {
    ///     net.forward(batch);
    ///     Ok(None)
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of `step` and of [`LoraModel::wrap`]; [`Error::Config`] for another
    /// initialisation, layers that aren't linear, layers that no batch reached,
    /// batches with too few rows for `eva`, and directions that don't settle;
    /// [`Error::NotFinite`].
    pub fn wrap_with_data<B>(
        base: impl Into<Base<M>>,
        config: LoraConfig,
        batches: &[B],
        step: impl FnMut(&M, &B) -> Result<Option<Tensor>>,
    ) -> Result<Self> {
        Self::start(base.into(), |base, switches| build(base, config, batches, step, switches))
    }
}

fn build<M, B>(
    base: &Base<M>,
    mut config: LoraConfig,
    batches: &[B],
    mut step: impl FnMut(&M, &B) -> Result<Option<Tensor>>,
    switches: &Arc<Switches>,
) -> Result<NamedAdapter> {
    config.check_supported()?;
    let init = config.init_lora_weights;
    let layers = linear_targets(base, &config)?;
    base.weights().freeze()?;
    let observed = Observed::new(layers, init == InitLoraWeights::LoraGa);
    let mut run = |batch: &B| step(base.module(), batch);
    let data = match init {
        InitLoraWeights::Eva => observed.eva(&mut config, batches, &mut run)?,
        InitLoraWeights::Corda => observed.corda(&config, batches, &mut run)?,
        InitLoraWeights::LoraGa => observed.lora_ga(&config, batches, &mut run)?,
        other => {
            let found = other.name().unwrap_or("true or false".into());
            return Err(Error::config(
                "init_lora_weights",
                "\"eva\", \"corda\" or \"lora_ga\" where data is given",
                found,
            ));
        }
    };
    drop(observed);
    let init = Init { init, data: Some(&data), largest_rank: None };
    let mut adapter = NamedAdapter::build(DEFAULT, base, config.into(), init, switches)?;
    adapter.keep_initial()?;
    Ok(adapter)
}

/// A layer that the configuration means.
struct Target {
    path: String,
    site: Arc<Site>,
    settings: LayerSettings,
}

fn linear_targets<M>(base: &Base<M>, config: &LoraConfig) -> Result<Vec<Target>> {
    let mut linear = Vec::new();
    for targets::Target { path, weight, form, settings, .. } in targets::targets(base, &config.clone().into())?.all {
        if !matches!(form, LayerForm::Linear { .. }) {
            let expected = "linear layers for an initialisation from data";
            return Err(Error::config("target_modules", expected, format!("{path}, {form:?}")));
        }
        linear.push(Target { site: weight.site_or_attach()?, path, settings });
    }
    Ok(linear)
}

/// Layers of which the data is looked at, until this is dropped.
struct Observed(Vec<(Target, Arc<Observer>)>);

type Data = HashMap<String, Arc<LayerData>>;

impl Observed {
    fn new(targets: Vec<Target>, gradient: bool) -> Self {
        let observe = |target: Target| {
            let observer = Arc::new(if gradient { Observer::of_gradient() } else { Observer::of_inputs() });
            target.site.set_active([Arc::clone(&observer) as Arc<dyn Adapter>]);
            (target, observer)
        };
        Observed(targets.into_iter().map(observe).collect())
    }

    /// Ranks and directions; the ranks go to `config`.
    fn eva<B>(
        &self,
        config: &mut LoraConfig,
        batches: &[B],
        run: &mut impl FnMut(&B) -> Result<Option<Tensor>>,
    ) -> Result<Data> {
        let eva_config = config.eva_config()?;
        let layers = self.0.iter().map(|(target, _)| {
            let shape = target.site.frozen().shape();
            let inn = shape[usize::from(!config.fan_in_fan_out)];
            (target.path.clone(), inn, target.settings.r)
        });
        let mut eva = Eva::new(eva_config, layers)?;
        for batch in std::iter::repeat_n(batches, MAX_PASSES).flatten() {
            for (layer, (_, observer)) in eva.layers.iter().zip(&self.0) {
                observer.set_on(!layer.done());
            }
            let mask = tch::no_grad(|| run(batch))?;
            for (layer, (_, observer)) in eva.layers.iter_mut().zip(&self.0) {
                for input in observer.take_inputs() {
                    layer.add(&rows(&layer.path, &input, mask.as_ref())?, eva_config.tau)?;
                }
            }
            eva.distribute()?;
            if eva.done() {
                break;
            }
        }
        if let Some(layer) = eva.layers.iter().find(|layer| !layer.has_seen()) {
            let expected = format!("batches of at least {} positions in {}", layer.components(), layer.path);
            return Err(Error::config("eva_config", expected, "smaller ones"));
        }
        if !eva.done() {
            let found = format!("directions that still turn after {MAX_PASSES} passes");
            return Err(Error::config("eva_config", "a lower tau, or more data", found));
        }

        let mut data = Data::new();
        let (mut targets, mut ranks, mut alphas) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, (target, _)) in eva.layers.iter().zip(&self.0) {
            let (LayerSettings { r, lora_alpha, .. }, rank) = (target.settings, layer.rank as i64);
            let Some(directions) = eva.directions(layer)?.filter(|_| rank > 0) else { continue };
            let adjusted =
                if eva_config.adjust_scaling_factors { lora_alpha * rank as f64 / r as f64 } else { lora_alpha };
            if rank != config.r {
                ranks.push((layer.path.clone(), rank));
            }
            if adjusted != config.lora_alpha {
                alphas.push((layer.path.clone(), adjusted));
            }
            targets.push(layer.path.clone());
            data.insert(layer.path.clone(), Arc::new(LayerData::Directions(SharedTensor::new(directions))));
        }
        config.target_modules = Some(TargetModules::List(targets));
        config.rank_pattern = LayerPattern::of_paths(ranks);
        config.alpha_pattern = LayerPattern::of_paths(alphas);
        Ok(data)
    }

    fn corda<B>(
        &self,
        config: &LoraConfig,
        batches: &[B],
        run: &mut impl FnMut(&B) -> Result<Option<Tensor>>,
    ) -> Result<Data> {
        let mut sums: Vec<Covariance> = self.0.iter().map(|_| Covariance::default()).collect();
        for batch in batches {
            let mask = tch::no_grad(|| run(batch))?;
            for (sum, (target, observer)) in sums.iter_mut().zip(&self.0) {
                for input in observer.take_inputs() {
                    sum.add(&target.path, &rows(&target.path, &input, mask.as_ref())?)?;
                }
            }
        }
        let method = config.corda_config()?.corda_method;
        let means = sums.iter().map(Covariance::mean);
        self.collect(means, |mean| LayerData::Covariance(mean, method))
    }

    fn lora_ga<B>(
        &self,
        config: &LoraConfig,
        batches: &[B],
        run: &mut impl FnMut(&B) -> Result<Option<Tensor>>,
    ) -> Result<Data> {
        for batch in batches {
            if run(batch)?.is_some() {
                return Err(Error::config("lora_ga_config", "no mask: leave positions out of the loss", "a mask"));
            }
        }
        let config = config.lora_ga_config()?;
        let means = self.0.iter().map(|(_, observer)| observer.mean_gradient());
        self.collect(means, |mean| LayerData::Gradient(mean, config))
    }

    /// What was found of each layer, none of which may be missing.
    fn collect(
        &self,
        found: impl Iterator<Item = Result<Option<Tensor>>>,
        data: impl Fn(SharedTensor) -> LayerData,
    ) -> Result<Data> {
        let mut all = Data::new();
        for (found, (target, _)) in found.zip(&self.0) {
            let Some(found) = found? else {
                let expected = "batches that reach every adapted layer";
                return Err(Error::config("init_lora_weights", expected, format!("none that reaches {}", target.path)));
            };
            all.insert(target.path.clone(), Arc::new(data(SharedTensor::new(found))));
        }
        Ok(all)
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        for (target, _) in &self.0 {
            target.site.set_active([]);
        }
    }
}

/// The positions of an input (…, in) that count, as (n, in).
fn rows(path: &str, input: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let inn = input.size().last().copied().unwrap_or(1);
    let rows = input.f_reshape([-1, inn])?;
    let Some(mask) = mask else { return Ok(rows) };
    let (found, n) = (mask.numel() as i64, rows.size()[0]);
    if found != n {
        let (name, expected) = (format!("mask of the positions of {path}"), format!("{n} values"));
        return Err(Error::Mismatch { name, expected, found: found.to_string() });
    }
    let index = mask.f_to_device(rows.device())?.f_flatten(0, -1)?.f_nonzero()?.f_flatten(0, -1)?;
    Ok(rows.f_index_select(0, &index)?)
}
