//! From the keys of a file to the modules of a base.

use super::keys::{KeyLayout, Part, parse_in};
use super::{AdapterFormat, flux, sgm};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::{Kind, Tensor};

/// One module of the base that the file adapts.
pub(super) struct Module {
    /// Its name in the file.
    pub(super) name: String,
    /// The tensors with their keys.
    pub(super) parts: BTreeMap<Part, (String, Tensor)>,
}

impl Module {
    pub(super) fn rank_and_key(&self) -> Option<(&str, i64)> {
        let (key, factor) = self.parts.get(&Part::A).or_else(|| self.parts.get(&Part::EmbeddingA))?;
        Some((key, factor.size().first().copied().unwrap_or(0)))
    }

    pub(super) fn rank(&self) -> Option<i64> {
        self.rank_and_key().map(|(_, r)| r)
    }

    pub(super) fn alpha(&self) -> Result<Option<f64>> {
        let Some((key, alpha)) = self.parts.get(&Part::Alpha) else { return Ok(None) };
        if alpha.numel() != 1 {
            return Err(Error::Mismatch {
                name: key.clone(),
                expected: "one number".into(),
                found: format!("{:?}", alpha.size()),
            });
        }
        Ok(Some(alpha.f_to_kind(Kind::Double)?.f_flatten(0, -1)?.f_double_value(&[0])?))
    }
}

/// The tensors of a component by the modules of the base that they belong to.
///
/// # Errors
/// [`Error::Keys`] with all keys that belong to none, and all that lack
/// another; [`Error::Corrupt`] for a key of two modules, and two keys of one
/// part; [`Error::Mismatch`] for rows that can't be divided.
pub(super) fn resolve<'b>(
    file: &Path,
    format: AdapterFormat,
    component: &str,
    layers: &[&'b str],
    renamed: &[String],
    tensors: BTreeMap<String, Tensor>,
) -> Result<BTreeMap<&'b str, Module>> {
    let layout = format.keys();
    let mut known = Names::new(layout, component, layers, renamed);
    if matches!(format, AdapterFormat::Kohya | AdapterFormat::ComfyUi) {
        known.add_original(layout, component, layers, renamed);
    }
    // Mostly one path; several for a layer of which they are the rows.
    let mut found: BTreeMap<Vec<&str>, Module> = BTreeMap::new();
    let mut unexpected = Vec::new();
    for (key, tensor) in tensors {
        let Some(parsed) = parse_in(layout, &key, component) else {
            // What belongs to another component is none of ours.
            let ours = layout.component(&key).is_none_or(|(found, _)| found == component);
            if ours || component.is_empty() {
                unexpected.push(key);
            }
            continue;
        };
        let paths = known.modules(file, &key, parsed.name)?;
        if paths.is_empty() {
            unexpected.push(key);
            continue;
        }
        let (name, part) = (parsed.name.to_string(), parsed.part);
        let module = found.entry(paths).or_insert_with(|| Module { name, parts: BTreeMap::new() });
        if let Some((other, _)) = module.parts.insert(part, (key.clone(), tensor)) {
            return Err(twice(file, &other, &key));
        }
    }
    let mut missing = Vec::new();
    for module in found.values() {
        for (one, other) in [(Part::A, Part::B), (Part::EmbeddingA, Part::EmbeddingB)] {
            match (module.parts.get(&one), module.parts.get(&other)) {
                (Some((key, _)), None) | (None, Some((key, _))) => missing.push(format!("the other half of {key}")),
                _ => {}
            }
        }
        if module.rank().is_none() {
            unexpected.extend(module.parts.values().map(|(key, _)| key.clone()));
        }
    }
    if found.is_empty() && unexpected.is_empty() {
        missing.push(format!("any of the component {component:?}"));
    }
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::Keys { path: file.into(), missing, unexpected });
    }
    let mut modules: BTreeMap<&str, Module> = BTreeMap::new();
    for (paths, module) in found {
        for (path, module) in divide(paths, module)? {
            if let Some(other) = modules.get(path) {
                return Err(twice(file, &other.name, &module.name));
            }
            modules.insert(path, module);
        }
    }
    Ok(modules)
}

fn twice(file: &Path, one: &str, other: &str) -> Error {
    Error::corrupt(file, format!("{one} and {other} are both for one part of a module"))
}

/// A layer whose rows are several modules: A and alpha for each, and B by rows.
/// The first ones are as wide as the input, the last has what is left.
fn divide(paths: Vec<&str>, module: Module) -> Result<Vec<(&str, Module)>> {
    if let [path] = paths.as_slice() {
        return Ok(vec![(path, module)]);
    }
    let sizes = |part| module.parts.get(&part).map(|(_, factor): &(String, Tensor)| factor.size());
    let (rows, width) = match (sizes(Part::A).as_deref(), sizes(Part::B).as_deref()) {
        (Some([_, width]), Some([rows, _])) => (*rows, *width),
        _ => (0, 0),
    };
    let last = rows - width * (paths.len() as i64 - 1);
    if width <= 0 || last <= 0 {
        let expected = format!("rows of {}, of which all but the last have the input's width", paths.join(", "));
        return Err(Error::Mismatch { name: module.name, expected, found: format!("{rows} rows, width {width}") });
    }
    let mut divided = Vec::with_capacity(paths.len());
    let count = paths.len();
    for (i, path) in paths.into_iter().enumerate() {
        let mut parts = BTreeMap::new();
        for (part, (key, tensor)) in &module.parts {
            let length = if i + 1 == count { last } else { width };
            let tensor = match part {
                Part::B => tensor.f_narrow(0, width * i as i64, length)?,
                _ => tensor.shallow_clone(),
            };
            parts.insert(*part, (key.clone(), tensor));
        }
        divided.push((path, Module { name: module.name.clone(), parts }));
    }
    Ok(divided)
}

/// The modules of a base by the names that they may have in a file.
struct Names<'b> {
    /// Those under which they are written.
    own: HashMap<String, Vec<&'b str>>,
    /// Older ones.
    others: HashMap<String, Vec<&'b str>>,
    /// Those of layers whose rows are several modules.
    rows: HashMap<String, Vec<&'b str>>,
}

impl<'b> Names<'b> {
    fn new(layout: &dyn KeyLayout, component: &str, layers: &[&'b str], renamed: &[String]) -> Self {
        let mut known = Names { own: HashMap::new(), others: HashMap::new(), rows: HashMap::new() };
        for (path, renamed) in layers.iter().zip(renamed) {
            if let Some((own, others)) = layout.names(component, renamed).split_first() {
                known.own.entry(own.clone()).or_default().push(path);
                others.iter().for_each(|name| known.add(path, name.clone()));
            }
        }
        known
    }

    /// Another name for a module.
    fn add(&mut self, path: &'b str, name: String) {
        let paths = self.others.entry(name).or_default();
        if !paths.contains(&path) {
            paths.push(path);
        }
    }

    /// The names that kohya's trainer and ComfyUI have from the models' own
    /// code.
    fn add_original(&mut self, layout: &dyn KeyLayout, component: &str, layers: &[&'b str], renamed: &[String]) {
        let spelt = |name: &str| layout.names(component, name).into_iter().next();
        for (path, name) in layers.iter().zip(sgm::names(renamed)) {
            if let Some(name) = name.as_deref().and_then(spelt) {
                self.add(path, name);
            }
        }
        for (name, paths) in flux::layers(layers, renamed) {
            match (spelt(&name), paths.as_slice()) {
                (Some(name), [path]) => self.add(path, name),
                (Some(name), _) => drop(self.rows.insert(name, paths)),
                (None, _) => {}
            }
        }
    }

    /// The module of that name, or those that are its rows; none if there is
    /// no such name.
    fn modules(&self, file: &Path, key: &str, name: &str) -> Result<Vec<&'b str>> {
        match self.own.get(name).or_else(|| self.others.get(name)).map(Vec::as_slice) {
            None => Ok(self.rows.get(name).cloned().unwrap_or_default()),
            Some([path]) => Ok(vec![path]),
            Some(several) => {
                let reason =
                    format!("{key} may belong to {}: give their names by a key mapping", several.join(" or to "));
                Err(Error::corrupt(file, reason))
            }
        }
    }
}
