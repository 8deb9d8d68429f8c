use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A folder of its own in which commands run, gone when dropped.
pub(crate) struct Place {
    folder: TempDir,
}

/// Where the shipped fixtures lie.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

impl Place {
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

    /// Names of all files below the folder, sorted: for "nothing was left behind".
    pub(crate) fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        list(self.folder.path(), "", &mut found);
        found.sort();
        found
    }
}

fn copy(from: &Path, to: &Path) {
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
