use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, lchown},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A folder of its own in which commands run, gone when dropped.
pub(crate) struct Workspace {
    folder: TempDir,
}

/// Where the shipped fixtures lie.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

impl Workspace {
    pub(crate) fn new() -> Self {
        Self { folder: TempDir::new().expect("a temporary folder can be made") }
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file in the folder.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("folders can be made");
        fs::write(&path, bytes).expect("files can be written");
        path
    }

    /// Copies a fixture, file or folder, into the folder under its own name.
    pub(crate) fn copy_fixture(&self, name: &str) -> PathBuf {
        let from = fixtures().join(name);
        let to = self.path(from.file_name().and_then(|name| name.to_str()).expect("fixtures have names"));
        copy(&from, &to);
        to
    }

    /// The binary, about to run in the folder with an environment of its own. Of `line`, each word is an argument, and
    /// `[FIXTURES]` and `[DIR]` stand for their paths.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_neuroada-ckpt"));
        let expand = |word: &str| {
            word.replace("[FIXTURES]", &fixtures().to_string_lossy())
                .replace("[DIR]", &self.folder.path().to_string_lossy())
        };
        command
            .args(line.split_whitespace().map(expand))
            .current_dir(self.folder.path())
            .env_clear()
            .env("HOME", self.folder.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs the binary (see [`Self::command`]) and returns what a snapshot holds: exit code, stdout, stderr.
    pub(crate) fn run(&self, line: &str) -> String {
        self.told(&self.output(line))
    }

    /// Runs the binary and returns stdout; it must end well.
    pub(crate) fn stdout(&self, line: &str) -> Vec<u8> {
        let output = self.output(line);
        assert!(output.status.success(), "{line}\n{}", self.told(&output));
        output.stdout
    }

    /// Runs the binary with `--json` and returns the document; whatever the exit code.
    pub(crate) fn json(&self, line: &str) -> serde_json::Value {
        let output = self.output(&format!("{line} --json"));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{line}: {e}\n{}", self.told(&output)))
    }

    pub(crate) fn output(&self, line: &str) -> Output {
        self.command(line).output().expect("the binary runs")
    }

    /// An output with the folder's and the fixtures' paths cut short.
    pub(crate) fn told(&self, output: &Output) -> String {
        let words = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes)
                .replace(&*self.folder.path().to_string_lossy(), "[DIR]")
                .replace(&*fixtures().to_string_lossy(), "[FIXTURES]")
        };
        let code = output.status.code().map_or_else(|| output.status.to_string(), |code| code.to_string());
        format!("exit: {code}\n--- stdout\n{}--- stderr\n{}", words(&output.stdout), words(&output.stderr))
    }

    /// The same as [`Self::output`] for a user without privileges, who owns the folder and what is in it. `None` where nobody else can
    /// run the binary: the reason is printed.
    pub(crate) fn output_of_another_user(&self, line: &str, owns: bool) -> Option<Output> {
        const NOBODY: u32 = 65534;
        let command = self.command(line);
        if fs::metadata(self.folder.path()).expect("the folder is there").uid() != 0 {
            // Whoever runs the tests has no privileges.
            return owns.then(|| self.output(line)).or_else(|| skip("only root can be somebody else"));
        }
        if owns {
            each_below(self.folder.path(), &mut |path| {
                lchown(path, Some(NOBODY), Some(NOBODY)).expect("root gives away");
            });
        }
        open_to_all(self.folder.path());
        let as_nobody = |program: &std::ffi::OsStr, arguments: Vec<&std::ffi::OsStr>| {
            let mut setpriv = Command::new("setpriv");
            setpriv
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
                .arg(program)
                .args(arguments)
                .current_dir(self.folder.path())
                .env_clear()
                .env("PATH", std::env::var_os("PATH").unwrap_or_default())
                .stdin(Stdio::null());
            setpriv.output()
        };
        let can_run = as_nobody(command.get_program(), vec!["--version".as_ref()]);
        if !can_run.is_ok_and(|output| output.status.success()) {
            return skip("another user cannot run the binary here, or there is no setpriv");
        }
        Some(as_nobody(command.get_program(), command.get_args().collect()).expect("setpriv runs"))
    }

    /// Every entry below the folder, links not followed: its name, kind, mode, time and content. For "nothing changed".
    pub(crate) fn tree(&self) -> Vec<String> {
        let mut found = Vec::new();
        each_below(self.folder.path(), &mut |path| found.push(self.entry(path)));
        found.sort();
        found
    }

    fn entry(&self, path: &Path) -> String {
        let name = path.strip_prefix(self.folder.path()).expect("below the folder").display();
        let meta = fs::symlink_metadata(path).expect("entries can be examined");
        let (kind, mode, time) = (meta.file_type(), meta.mode(), (meta.mtime(), meta.mtime_nsec()));
        if kind.is_file() {
            let content = blake3::hash(&fs::read(path).expect("files can be read"));
            format!("{name} {mode:o} {time:?} {content}")
        } else if kind.is_symlink() {
            format!("{name} -> {}", fs::read_link(path).expect("links can be read").display())
        } else {
            let special = kind.is_fifo() || kind.is_char_device();
            format!("{name}{} {mode:o}", if special { "|" } else { "/" })
        }
    }

    /// Names of all files below the folder, sorted: for "nothing was left behind".
    pub(crate) fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        list(self.folder.path(), "", &mut found);
        found.sort();
        found
    }
}

/// Says why a test did not run.
pub(crate) fn skip<T>(why: &str) -> Option<T> {
    eprintln!("skipped: {why}");
    None
}

/// Lets everybody enter and read the folder itself.
fn open_to_all(folder: &Path) {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(folder, mode).expect("the folder is ours");
}

/// Calls `f` with `folder` and everything below, links not followed.
fn each_below(folder: &Path, f: &mut impl FnMut(&Path)) {
    f(folder);
    for entry in fs::read_dir(folder).expect("folders can be listed") {
        let entry = entry.expect("folders can be listed");
        match entry.file_type().expect("entries can be examined").is_dir() {
            true => each_below(&entry.path(), f),
            false => f(&entry.path()),
        }
    }
}

/// Copies a file, or a folder with all that is in it.
pub(crate) fn copy(from: &Path, to: &Path) {
    if !from.is_dir() {
        fs::copy(from, to).expect("fixtures can be copied");
        return;
    }
    fs::create_dir_all(to).expect("folders can be made");
    for entry in fs::read_dir(from).expect("fixtures can be listed") {
        let entry = entry.expect("fixtures can be listed");
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

fn list(folder: &Path, below: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("folders can be listed") {
        let entry = entry.expect("folders can be listed");
        let name = format!("{below}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            list(&entry.path(), &format!("{name}/"), found);
        } else {
            found.push(name);
        }
    }
}
