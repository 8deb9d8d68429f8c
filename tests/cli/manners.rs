use insta::assert_snapshot;

use super::Place;

#[test]
fn version_is_that_of_the_crate() {
    assert_snapshot!(Place::new().run("--version"), @r"
    exit: 0
    --- stdout
    neuroada-ckpt 0.1.0
    --- stderr
    ");
}

#[test]
fn an_unknown_command_is_a_usage_error() {
    assert_snapshot!(Place::new().run("inspekt x"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: unrecognized subcommand 'inspekt'

      tip: a similar subcommand exists: 'inspect'

    Usage: neuroada-ckpt [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
}

#[test]
fn a_missing_file_is_named() {
    assert_snapshot!(Place::new().run("inspect nowhere"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot open `nowhere`: No such file or directory (os error 2)
    ");
}

#[test]
fn a_gpu_is_refused_in_words() {
    assert_snapshot!(Place::new().run("inspect x --device cuda:0"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value 'cuda:0' for '--device <DEVICE>': this build has no GPU support; use auto or cpu

    For more information, try '--help'.
    ");
}

#[test]
fn too_little_memory_is_refused() {
    assert_snapshot!(Place::new().run("inspect x --max-memory 1M"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value '1M' for '--max-memory <SIZE>': at least 16M are needed

    For more information, try '--help'.
    ");
}
