//! From the keys of a file to the modules of a base.

use super::keys::{KeyLayout, parse_in};
use super::parts::{Module, twice};
use super::{AdapterFormat, flux, sgm};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::Tensor;

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
    if matches!(format, AdapterFormat::Kohya | AdapterFormat::ComfyUi | AdapterFormat::Lycoris) {
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
        module.check(file, &mut missing, &mut unexpected)?;
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

/// A layer whose rows are several modules. The first ones are as wide as the
/// input, the last has what is left.
fn divide(paths: Vec<&str>, module: Module) -> Result<Vec<(&str, Module)>> {
    if let [path] = paths.as_slice() {
        return Ok(vec![(path, module)]);
    }
    let [rows, width] = module.features().unwrap_or_default();
    let last = width.checked_mul(paths.len() as i64 - 1).map_or(0, |first| rows - first);
    if width <= 0 || last <= 0 {
        let expected = format!("rows of {}, of which all but the last have the input's width", paths.join(", "));
        return Err(Error::Mismatch { name: module.name, expected, found: format!("{rows} rows, width {width}") });
    }
    let count = paths.len();
    let piece = |(i, path)| {
        let length = if i + 1 == count { last } else { width };
        Ok((path, module.rows(width * i as i64, length)?))
    };
    paths.into_iter().enumerate().map(piece).collect()
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
