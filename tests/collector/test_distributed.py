"""Statistics of all ranks, in real processes: those of one process, whatever the ranks divide among them."""

import functools
import multiprocessing
import time

import pytest
import torch
import torch.multiprocessing as mp

from tests.collector import distributed_cases

pytestmark = pytest.mark.slow  # processes for the ranks start within seconds

SECONDS = 150
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "transformers.models.llama.modeling_llama"]


def run(world_size, folder):
    """What all cases returned on each rank. Ranks that do not come to an end are killed."""
    if METHOD == "forkserver":
        multiprocessing.get_context(METHOD).set_forkserver_preload(PRELOADED)
    ranks = mp.start_processes(distributed_cases.work, (world_size, folder), world_size, join=False, start_method=METHOD)
    deadline = time.monotonic() + SECONDS
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            pytest.fail(f"{world_size} ranks hang")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What a case returned on each of a number of ranks; all cases of that number run in one group of processes."""
    ranks = functools.cache(lambda world_size: run(world_size, tmp_path_factory.mktemp(f"ranks{world_size}")))
    return lambda case, world_size=2: [outcomes[case] for outcomes in ranks(world_size)]


@functools.cache
def in_one_process(name):
    return distributed_cases.figures(distributed_cases.in_one_process(name).compute())


@pytest.mark.parametrize("name", distributed_cases.MODELS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_counts_are_those_of_one_process(outcomes, kind, name, world_size):
    assert outcomes(f"{kind} {name}", world_size) == [in_one_process(name)] * world_size


@pytest.mark.parametrize("name", distributed_cases.MODELS)
def test_counts_of_a_mesh_of_both_are_those_of_one_process(outcomes, name):
    assert outcomes(f"mesh {name}", 4) == [in_one_process(name)] * 4


@pytest.mark.parametrize("mode", ["enable_grad", "inference_mode"])
@pytest.mark.parametrize("parallel", ["fully_sharded", "tensor_parallel"])
def test_counts_do_not_depend_on_the_mode(outcomes, parallel, mode):
    assert outcomes(f"in_mode {parallel} {mode}") == [True, True]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("use_local_output", [True, False])
@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("neurons", [10, 2])
def test_unevenly_divided_neurons_are_put_together_in_order(outcomes, neurons, world_size, use_local_output, grad):
    sizes = [len(chunk) for chunk in torch.arange(neurons).chunk(world_size)]
    sizes += [0] * (world_size - len(sizes))
    assert outcomes(f"uneven {neurons} {use_local_output} {grad}", world_size) == [(True, size) for size in sizes]


@pytest.mark.parametrize("use_local_output", [True, False])
def test_neurons_are_followed_through_reshapes(outcomes, use_local_output):
    assert outcomes(f"reshapes {use_local_output}") == [[True, True]] * 2


@pytest.mark.parametrize("use_local_output", [True, False])
def test_activations_that_are_functions(outcomes, use_local_output):
    assert outcomes(f"functional {use_local_output}") == [True, True]


def test_neurons_of_parts_of_weights(outcomes):
    assert outcomes("local_weights") == [True, True]


def test_a_plan_of_transformers(outcomes):
    assert outcomes("transformers_plan") == [True, True]


@pytest.mark.parametrize("head", ["to_local", "plain layer", "DTensor"])
def test_what_all_ranks_have_is_counted_once(outcomes, head):
    assert outcomes(f"replicated {head}") == [True, True]


def test_weights_that_somebody_looks_at_make_no_rank_a_copy(outcomes):
    assert outcomes("weights_that_are_looked_at") == [True, True]


def test_different_counts_are_not_left_out_as_a_copy(outcomes):
    assert all("site 'relu' of rank 1 is taken for a copy" in said for said in outcomes("no_copies"))


def test_nan_is_counted_once(outcomes):
    assert outcomes("nan_is_counted_once") == [{"a": 2 * 6, "b": 2 * 3}] * 2


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("use_local_output", [True, False])
def test_tokens_that_ranks_divide_are_summed(outcomes, use_local_output, padded):
    assert outcomes(f"sequence_parallel {use_local_output} {padded}") == [True, True]


@pytest.mark.parametrize("divided", ["data", "neurons"])
def test_entropies_of_batches_are_those_of_one_process(outcomes, divided):
    assert outcomes(f"entropies_of_batches {divided}") == [(True, True)] * 2


@pytest.mark.parametrize("divided", ["data", "neurons"])
def test_batches_without_values_count_as_none(outcomes, divided):
    assert outcomes(f"batches_with_gaps {divided}") == [(True, True, (4, [4, 0, 4, 4, 4, 4]))] * 2


def test_notes_and_marks_of_all_ranks_are_kept(outcomes):
    assert outcomes("notes_of_ranks") == [(("all", "rank 0", "rank 1"), True, -1)] * 2


def test_batches_whose_tokens_are_divided_are_not_told_apart(outcomes):
    assert outcomes("batches_of_divided_tokens") == [{"relu": (True, 0), "gelu": (False, 2)}] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_stages_of_a_pipeline_are_put_together_by_rank(outcomes, world_size):
    assert outcomes("pipeline", world_size) == [(True, True)] * world_size


def test_a_rank_without_batches_adds_nothing(outcomes):
    assert outcomes("a_rank_without_batches") == [True, True]


def test_a_site_that_one_rank_has_not_met_is_that_of_the_others(outcomes):
    assert outcomes("an_expert_without_tokens") == [{"first.1": True, "second.1": True}] * 2


@pytest.mark.parametrize(("case", "site"), [("other_modules", "3"), ("other_neurons", "1"), ("other_activation", "1")])
def test_all_ranks_are_told_of_different_models(outcomes, case, site):
    first, second = outcomes(case)
    assert first == second
    assert first.startswith(f"ranks 0 and 1 counted different sites ({site}); run the same model on both")


def test_unfollowed_neurons_are_an_error_on_all_ranks(outcomes):
    first, second = outcomes("not_followed")
    assert first == second
    assert "site 'relu' of rank 0 cannot be added to those of other ranks" in first
    assert "use_local_output=False" in first


def test_sums_that_ranks_have_yet_to_add_up_are_refused(outcomes):
    assert all(
        "redistribute it to Replicate() or Shard(…) before the activation" in error for error in outcomes("partial_sums")
    )


def test_an_input_that_is_divided_in_another_way_is_refused(outcomes):
    assert all("collect such passes apart" in error for error in outcomes("divided_otherwise"))


def test_a_sync_in_the_middle_changes_nothing(outcomes):
    assert outcomes("in_the_middle") == [(True, True)] * 2


def test_each_rank_goes_on_from_its_own_state(outcomes):
    for before, after, error in outcomes("restored"):
        assert (before, after) == (True, True)
        assert "site '1' of rank 1" in error
        assert "load on each rank the state that it saved" in error


@pytest.mark.parametrize("parallel", [True, False])
def test_passes_issue_no_collectives_of_ours(outcomes, parallel):
    for during, without in outcomes(f"collectives {parallel}"):
        assert during == without
        assert ("gloo:all_reduce" in without) == parallel


@pytest.mark.parametrize(("average", "dtypes"), [("dataset", ["torch.int64"]), ("batch", ["torch.int64", "torch.float64"])])
def test_a_sync_is_one_reduction_of_all_integers(outcomes, average, dtypes):
    assert outcomes(f"reductions {average}") == [dtypes] * 2
