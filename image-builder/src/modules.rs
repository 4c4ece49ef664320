//! Chooses the kernel modules that a guest needs, with everything that they depend on, in the order to load them.
//!
//! A Debian package carries no `modules.dep` (depmod writes that at installation), so the dependencies are read where
//! depmod reads them: in each module's `.modinfo` section.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection};

use crate::bzimage::filter;
use crate::error::{Error, Result};

/// What the kernel appends to a signed module (`include/linux/module_signature.h`).
const SIGNATURE_MAGIC: &[u8] = b"~Module signature appended~\n";

/// A kernel module, uncompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// With underscores, as the kernel knows it.
    pub name: String,
    /// The ELF file.
    pub content: Vec<u8>,
}

/// The modules of one unpacked kernel.
pub struct ModuleTree {
    release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// Reads `lib/modules/<release>`.
    pub fn open(directory: &Path) -> Result<Self> {
        let release = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let list = directory.join("modules.builtin");
        let builtin = fs::read_to_string(&list).map_err(Error::file("read", &list))?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut files = BTreeMap::new();
        find_modules(&directory.join("kernel"), &mut files)?;
        Ok(Self { release, files, builtin })
    }

    /// The modules named, and those that they depend on, each after what it depends on. Built-in ones are left out.
    pub fn select<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<Module>> {
        let mut selection = Selection { tree: self, ordered: Vec::new(), done: BTreeSet::new(), path: Vec::new() };
        for name in names {
            selection.add(&normalise(name.as_ref()))?;
        }
        Ok(selection.ordered)
    }
}

/// Depth-first walk over the dependencies.
struct Selection<'a> {
    tree: &'a ModuleTree,
    ordered: Vec<Module>,
    done: BTreeSet<String>,
    /// From the module asked for to the one being added.
    path: Vec<String>,
}

impl Selection<'_> {
    fn add(&mut self, name: &str) -> Result<()> {
        if self.done.contains(name) {
            return Ok(());
        }
        if self.path.iter().any(|above| above == name) {
            let modules = self.path.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(" -> ");
            return Err(Error::ModuleCircle { modules });
        }
        let Some(file) = self.tree.files.get(name) else {
            if self.tree.builtin.contains(name) {
                return Ok(());
            }
            return Err(Error::NoModule { kernel: self.tree.release.clone(), module: name.to_owned() });
        };
        let content = read_module(file)?;
        self.path.push(name.to_owned());
        for dependency in dependencies(name, &content)? {
            self.add(&dependency)?;
        }
        self.path.pop();
        self.done.insert(name.to_owned());
        self.ordered.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

/// `virtio_rng` of `virtio-rng`: the kernel takes both for one name.
fn normalise(name: &str) -> String {
    name.replace('-', "_")
}

/// `erofs` of `kernel/fs/erofs/erofs.ko.xz`; `None` for other files.
fn module_name(path: &Path) -> Option<String> {
    let (name, suffix) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&suffix).then(|| normalise(name))
}

fn find_modules(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::file("read", directory))? {
        let entry = entry.map_err(Error::file("read", directory))?;
        let path = entry.path();
        if entry.file_type().map_err(Error::file("read", &path))?.is_dir() {
            find_modules(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// A module's ELF file, without its signature: the kernels that we boot do not ask for one, and checking it would cost
/// every boot a hash over every module.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(Error::file("read", path))?;
    let name = path.display().to_string();
    let mut module = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => filter("xz", &name, &bytes)?,
        Some("gz") => filter("gzip", &name, &bytes)?,
        Some("zst") => {
            zstd::decode_all(bytes.as_slice()).map_err(|error| Error::malformed(&name, error.to_string()))?
        }
        _ => bytes,
    };
    module.truncate(signed_length(&module));
    Ok(module)
}

/// Length of a module up to its signature, which ends with its own length (big endian), 12 bytes in all, and a magic.
fn signed_length(module: &[u8]) -> usize {
    let Some((before, trailer)) = module.strip_suffix(SIGNATURE_MAGIC).and_then(|rest| rest.split_last_chunk::<12>())
    else {
        return module.len();
    };
    let [.., a, b, c, d] = *trailer;
    before.len().checked_sub(u32::from_be_bytes([a, b, c, d]) as usize).unwrap_or(module.len())
}

/// The modules named by `depends=` in `.modinfo`.
fn dependencies(name: &str, module: &[u8]) -> Result<Vec<String>> {
    let malformed = |reason: String| Error::malformed(format!("the kernel module {name}"), reason);
    let elf = ElfFile64::<object::Endianness>::parse(module).map_err(|error| malformed(error.to_string()))?;
    let section = elf.section_by_name(".modinfo").ok_or_else(|| malformed("it has no .modinfo section".to_owned()))?;
    let modinfo = section.data().map_err(|error| malformed(error.to_string()))?;
    let fields = modinfo.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok());
    let lists = fields.filter_map(|field| field.strip_prefix("depends="));
    Ok(lists.flat_map(|list| list.split(',')).filter(|name| !name.is_empty()).map(normalise).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::write::{Object as ElfWriter, StandardSegment};
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    fn module(depends: &str) -> Vec<u8> {
        let mut elf = ElfWriter::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let segment = elf.segment_name(StandardSegment::Data).to_vec();
        let section = elf.add_section(segment, b".modinfo".to_vec(), SectionKind::ReadOnlyData);
        elf.append_section_data(section, format!("license=GPL\0depends={depends}\0").as_bytes(), 1);
        elf.write().unwrap()
    }

    fn tree(modules: &[(&str, &str)]) -> (tempfile::TempDir, ModuleTree) {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("6.1.0-test/kernel");
        fs::create_dir_all(&kernel).unwrap();
        fs::write(directory.path().join("6.1.0-test/modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        for (file, depends) in modules {
            fs::write(kernel.join(file), module(depends)).unwrap();
        }
        let tree = ModuleTree::open(&directory.path().join("6.1.0-test")).unwrap();
        (directory, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_before_what_needs_them_and_once() {
        let (_directory, tree) =
            tree(&[("virtio-rng.ko", "virtio"), ("virtiofs.ko", "fuse,virtio"), ("virtio.ko", ""), ("fuse.ko", "")]);
        let modules = tree.select(&["virtiofs", "virtio-rng"]).unwrap();
        assert_eq!(names(&modules), ["fuse", "virtio", "virtiofs", "virtio_rng"]);
    }

    #[test]
    fn a_built_in_module_is_left_out() {
        let (_directory, tree) = tree(&[("fuse.ko", "ext4")]);
        assert_eq!(names(&tree.select(&["ext4", "fuse"]).unwrap()), ["fuse"]);
    }

    #[test]
    fn a_module_that_is_nowhere_is_an_error_naming_it() {
        let (_directory, tree) = tree(&[]);
        assert_eq!(
            tree.select(&["virtio_blq"]).unwrap_err().to_string(),
            "the kernel 6.1.0-test has no module virtio_blq, neither as a file nor built in; correct `modules` under [kernel]"
        );
    }

    #[test]
    fn a_circle_is_an_error_naming_its_members() {
        let (_directory, tree) = tree(&[("a.ko", "b"), ("b.ko", "a")]);
        assert!(tree.select(&["a"]).unwrap_err().to_string().contains("a -> b -> a"));
    }

    #[test]
    fn a_signature_is_cut_off() {
        let mut signed = b"module".to_vec();
        signed.extend_from_slice(b"sig");
        signed.extend_from_slice(&[0; 8]);
        signed.extend_from_slice(&3_u32.to_be_bytes());
        signed.extend_from_slice(SIGNATURE_MAGIC);
        assert_eq!(signed_length(&signed), 6);
        assert_eq!(signed_length(b"module"), 6);
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        let error = dependencies("fuse", b"garbage").unwrap_err().to_string();
        assert!(error.starts_with("the kernel module fuse is not usable: "), "{error}");
    }
}
