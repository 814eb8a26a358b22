//! An adapter in the layout of another program.

use super::file::AdapterFile;
use super::keys::{AdapterKind, Part};
use super::settings::{ModuleSettings, exact_config};
use super::{AdapterFormat, diffusers, peft, safetensors, write_files};
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, Bias, LayerSettings};
use serde_json::Map;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// An adapter on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) config: &'a AdapterConfig,
    pub(crate) layers: Vec<OutgoingLayer<'a>>,
    /// The paths of all layers of the base.
    pub(crate) base: Vec<&'a str>,
}

/// One module of it.
#[derive(Debug)]
pub(crate) struct OutgoingLayer<'a> {
    pub(crate) path: &'a str,
    pub(crate) settings: LayerSettings,
    /// With the ends of PEFT's keys.
    pub(crate) tensors: Vec<(&'static str, Tensor)>,
}

impl OutgoingLayer<'_> {
    fn size(&self, part: Part) -> Option<Vec<i64>> {
        let tensor = self.tensors.iter().find(|(end, _)| Part::of_peft_end(end) == Some(part));
        tensor.map(|(_, tensor)| tensor.size())
    }
}

/// Name of a file of which the program asks none.
const OTHER_FILE: &str = "lora.safetensors";

/// Writes the adapter; each file appears whole or not at all.
///
/// # Errors
/// [`Error::Config`], [`Error::Unsupported`], [`Error::Io`].
pub(crate) fn write(file: &AdapterFile, format: AdapterFormat, adapter: &Outgoing<'_>) -> Result<()> {
    if let Some(other) = file.format.filter(|other| *other != format) {
        return Err(Error::config("format", format!("{format}, as in the call"), other));
    }
    refuse_other_parts(format, adapter)?;
    let (folder, name) = place(file, format)?;
    let writer = Writer::new(file, format, adapter)?;
    let files = match format {
        AdapterFormat::Peft => vec![
            (peft::WEIGHTS_FILE.to_string(), safetensors::serialize(&writer.tensors(peft_end)?)?),
            (peft::CONFIG_FILE.to_string(), peft::config_to_json(&writer.config())?),
        ],
        AdapterFormat::Diffusers => {
            let metadata = BTreeMap::from([(diffusers::METADATA_KEY.to_string(), writer.metadata()?)]);
            vec![(name, safetensors::serialize_with(&writer.tensors(peft_end)?, metadata)?)]
        }
        AdapterFormat::DiffusersOld => {
            let stem = if writer.component.starts_with("text_encoder") { ".lora_linear_layer" } else { ".lora" };
            let end = |part| Some(format!("{stem}.{}.weight", down_or_up(part)?));
            vec![(name, safetensors::serialize(&writer.folded(end)?)?)]
        }
        AdapterFormat::Kohya | AdapterFormat::Lycoris => {
            let tensors = writer.with_alphas(kohya_end, true)?;
            vec![(name, safetensors::serialize(&tensors)?)]
        }
        AdapterFormat::ComfyUi => vec![(name, safetensors::serialize(&writer.with_alphas(peft_end, false)?)?)],
    };
    write_files(&folder, &files)
}

/// The folder, and the file in it.
pub(super) fn place(file: &AdapterFile, format: AdapterFormat) -> Result<(PathBuf, String)> {
    let path = file.path();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    match (path.extension().is_some_and(|end| end == "safetensors"), name) {
        (true, _) if format == AdapterFormat::Peft => {
            Err(Error::config("file", "a folder, which holds two files, for PEFT's layout", path.display()))
        }
        (true, Some(name)) => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok((folder.into(), name))
        }
        _ => {
            let old_or_new = matches!(format, AdapterFormat::Diffusers | AdapterFormat::DiffusersOld);
            Ok((path.into(), if old_or_new { diffusers::WEIGHTS_FILE } else { OTHER_FILE }.into()))
        }
    }
}

/// What a layout has no keys for, by name.
fn refuse_other_parts(format: AdapterFormat, adapter: &Outgoing<'_>) -> Result<()> {
    let config = adapter.config;
    let mut fields = Vec::new();
    let whole = config.selection().modules_to_save;
    if !whole.is_empty() {
        fields.push(format!("modules_to_save = {whole:?}"));
    }
    if config.bias() != Bias::None {
        fields.push(format!("bias = {:?}", config.bias()));
    }
    let with_config = matches!(format, AdapterFormat::Peft | AdapterFormat::Diffusers);
    if let Some(config) = config.as_lora() {
        if config.trainable_token_indices.is_some() {
            fields.push("trainable_token_indices".into());
        }
        let init = config.init_lora_weights;
        if init.changes_base() && !with_config {
            let init = init.name().unwrap_or_default();
            fields.push(format!(
                "init_lora_weights = {init:?}, which changed the base (`save_as_lora` makes plain LoRA of it)"
            ));
        }
    }
    for layer in adapter.layers.iter().filter(|_| format != AdapterFormat::Peft) {
        let size = |part: Part, dim| layer.size(part).and_then(|sizes| sizes.get(dim).copied());
        let mut parts = layer.tensors.iter().map(|(end, _)| (*end, Part::of_peft_end(end)));
        if let Some((end, _)) = parts.find(|(_, part)| part.is_none_or(|part| !holds(format, part))) {
            fields.push(format!("{end} of {} in the layout of {format}", layer.path));
        } else if !with_config && size(Part::A, 0) != size(Part::B, 1) {
            fields.push(format!("a convolution in groups ({}) in the layout of {format}", layer.path));
        } else if !with_config && of_one_dimension(layer) {
            // The same tensors mean another product there.
            let path = layer.path;
            fields.push(format!("a convolution over one dimension by {} ({path})", config.peft_type()));
        }
    }
    if fields.is_empty() { Ok(()) } else { Err(Error::Unsupported { fields }) }
}

/// Whether a layout has keys for such a part.
fn holds(format: AdapterFormat, part: Part) -> bool {
    let kind = part.kind();
    match format {
        AdapterFormat::Peft => true,
        // diffusers loads no LoHa.
        AdapterFormat::Diffusers => kind != Some(AdapterKind::Loha),
        AdapterFormat::DiffusersOld => matches!(part, Part::A | Part::B),
        AdapterFormat::Kohya | AdapterFormat::ComfyUi => {
            matches!(part, Part::A | Part::B) || kind != Some(AdapterKind::Lora)
        }
        AdapterFormat::Lycoris => {
            matches!(part, Part::A | Part::B | Part::Magnitude) || kind != Some(AdapterKind::Lora)
        }
    }
}

/// Whether LoHa or LoKr has a whole or decomposed kernel over one dimension, or
/// one that looks like it.
fn of_one_dimension(layer: &OutgoingLayer<'_>) -> bool {
    let core = [Part::HadaT1, Part::LokrT2].into_iter().find_map(|part| layer.size(part));
    core.is_some_and(|sizes| sizes.last() == Some(&1)) || layer.size(Part::LokrW2).is_some_and(|sizes| sizes.len() == 3)
}

/// kohya's ends, with LyCORIS' for what kohya's trainer lacks.
fn kohya_end(part: Part) -> Option<String> {
    match part {
        Part::Magnitude => Some(".dora_scale".into()),
        _ => down_or_up(part).map(|half| format!(".lora_{half}.weight")).or_else(|| lycoris_end(part)),
    }
}

/// The ends of LoHa and LoKr, which all layouts share.
fn lycoris_end(part: Part) -> Option<String> {
    part.kind().filter(|kind| *kind != AdapterKind::Lora).and_then(|_| peft_end(part))
}

fn peft_end(part: Part) -> Option<String> {
    part.peft_end().map(|end| format!(".{end}"))
}

fn down_or_up(part: Part) -> Option<&'static str> {
    match part {
        Part::A => Some("down"),
        Part::B => Some("up"),
        _ => None,
    }
}

struct Writer<'a> {
    adapter: &'a Outgoing<'a>,
    component: String,
    /// What stands before a module's name.
    prefix: String,
    /// The names of all layers of the base in the file, without the prefix.
    base: Vec<String>,
    /// Those of the adapter's layers.
    names: Vec<String>,
}

impl<'a> Writer<'a> {
    fn new(file: &AdapterFile, format: AdapterFormat, adapter: &'a Outgoing<'a>) -> Result<Self> {
        let layout = format.keys();
        let component = match (&file.component, format) {
            (Some(component), _) => component.clone(),
            (None, AdapterFormat::Diffusers | AdapterFormat::DiffusersOld) => {
                let expected = format!("one of {}; \"\" for keys without one", diffusers::COMPONENTS.join(", "));
                return Err(Error::config("component", expected, "not given"));
            }
            (None, _) => String::new(),
        };
        if format == AdapterFormat::ComfyUi && component.starts_with("text_encoder") {
            let expected = "ComfyUI's own name of the text encoder: clip_l, clip_g, t5xxl, …";
            return Err(Error::config("component", expected, component));
        }
        let renamed = file.key_mapping.apply(&adapter.base)?;
        let own = |name: &String| layout.names(&component, name).into_iter().next().unwrap_or_default();
        let base: Vec<String> = renamed.iter().map(own).collect();
        let mut paths: HashMap<&str, Vec<&str>> = HashMap::new();
        for (name, path) in base.iter().zip(&adapter.base) {
            paths.entry(name).or_default().push(path);
        }
        let by_path: HashMap<&str, &String> = adapter.base.iter().copied().zip(&base).collect();
        let mut names = Vec::with_capacity(adapter.layers.len());
        for layer in &adapter.layers {
            let name = by_path.get(layer.path).copied().cloned().unwrap_or_default();
            if let Some([first, second, ..]) = paths.get(name.as_str()).map(Vec::as_slice) {
                let expected = format!("names that are told apart in the layout of {format}");
                return Err(Error::config("key_mapping", expected, format!("{name} for both {first} and {second}")));
            }
            names.push(name);
        }
        let prefix = layout.prefix(&component);
        Ok(Writer { adapter, component, prefix, base, names })
    }

    /// Each layer with its name in the file.
    fn layers(&self) -> impl Iterator<Item = (&String, &OutgoingLayer<'a>)> {
        self.names.iter().zip(&self.adapter.layers)
    }

    /// The tensors as they are, by the ends that `end` gives.
    fn tensors(&self, end: impl Fn(Part) -> Option<String>) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (name, layer) in self.layers() {
            for (peft_end, tensor) in &layer.tensors {
                let Some(end) = Part::of_peft_end(peft_end).and_then(&end) else { continue };
                let tensor = match (end.as_str(), tensor.size().iter().max(), layer.size(Part::A)) {
                    // One value for each output, with the weight's dimensions.
                    (".dora_scale", Some(&rows), Some(of_a)) => {
                        let mut sizes = vec![1; of_a.len()];
                        sizes[0] = rows;
                        tensor.f_reshape(sizes)?
                    }
                    _ => tensor.shallow_clone(),
                };
                tensors.insert(format!("{}{name}{end}", self.prefix), tensor);
            }
        }
        Ok(tensors)
    }

    /// The same with each module's alpha: the scale is alpha / r. Without one
    /// it is the rank, so that such need not be written.
    fn with_alphas(&self, end: impl Fn(Part) -> Option<String>, all: bool) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.tensors(end)?;
        let use_rslora = self.adapter.config.as_lora().is_some_and(|config| config.use_rslora);
        for (name, layer) in self.layers() {
            let settings = layer.settings;
            // With rsLoRA s is alpha / √r.
            let mut alpha = if use_rslora { settings.scaling * settings.r as f64 } else { settings.lora_alpha };
            if let Some(w1) = tensors.get_mut(&format!("{}{name}.lokr_w1", self.prefix))
                && layer.size(Part::LokrW2).is_some()
            {
                // Of whole factors readers leave alpha aside.
                *w1 = w1.f_to_kind(Kind::Float)?.f_mul_scalar(settings.scaling)?;
                alpha = settings.r as f64;
            }
            if alpha == settings.r as f64 && !all {
                continue;
            }
            // f64 where f32 would round it; readers take the number.
            let kind = if f64::from(alpha as f32) == alpha { Kind::Float } else { Kind::Double };
            let alpha = Tensor::f_full([], alpha, (Kind::Double, tch::Device::Cpu))?.f_to_kind(kind)?;
            tensors.insert(format!("{}{name}.alpha", self.prefix), alpha);
        }
        Ok(tensors)
    }

    /// The same where alpha is the rank: B · s, in f32. It is exact where s is
    /// a power of two.
    fn folded(&self, end: impl Fn(Part) -> Option<String>) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.tensors(&end)?;
        for (name, layer) in self.layers() {
            let Some(end) = end(Part::B) else { continue };
            if let Some(b) = tensors.get_mut(&format!("{}{name}{end}", self.prefix)) {
                *b = b.f_to_kind(Kind::Float)?.f_mul_scalar(layer.settings.scaling)?;
            }
        }
        Ok(tensors)
    }

    /// The configuration in the names of the file.
    fn config(&self) -> AdapterConfig {
        let mut config = self.adapter.config.clone();
        config.other_mut().insert("inference_mode".into(), true.into());
        if self.base.iter().zip(&self.adapter.base).all(|(name, path)| name == path) {
            return config;
        }
        let settings = self.layers().map(|(name, layer)| ModuleSettings {
            name: name.clone(),
            r: layer.settings.r,
            lora_alpha: layer.settings.lora_alpha,
            w1: layer.settings.w1,
        });
        let base: Vec<&str> = self.base.iter().map(String::as_str).collect();
        exact_config(config, &base, &settings.collect::<Vec<_>>())
    }

    /// The configuration as it stands in diffusers' header.
    fn metadata(&self) -> Result<String> {
        let prefix = if self.component.is_empty() { String::new() } else { format!("{}.", self.component) };
        let fields = peft::config_fields(&self.config());
        let fields: Map<_, _> = fields.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)).collect();
        Ok(String::from_utf8_lossy(&peft::to_json(fields)?).into_owned())
    }
}
