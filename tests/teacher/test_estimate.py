"""What a store will cost, said before it is made."""

import pytest

from support.flags import DATA
from support.programs import refusal
from timm_tinyvit import cli
from timm_tinyvit.teacher.estimate import estimate_store


def test_the_papers_stores_take_less_than_half_of_their_official_bytes():
    in1k = estimate_store(1_281_167, 1000, 300, 10)
    assert '384,350,100' in in1k and '18 bytes' in in1k and '6.9 GB' in in1k and '16.9 GB in the official' in in1k
    in22k = estimate_store(14_197_122, 21_841, 90, 100)
    assert '194 bytes' in in22k and '247.9 GB' in in22k and '516.2 GB in the official' in in22k
    assert '5.5 GB on disk in training, with --keep-epochs 2' in in22k


def test_hours_follow_from_the_teachers_speed_and_the_processes():
    text = estimate_store(3600, 1000, 100, 10, views_per_second=10, num_processes=5)
    assert '2.0 hours' in text and 'each of 5' in text
    assert 'hours' not in estimate_store(3600, 1000, 100, 10)
    assert '3.5 views/s' in estimate_store(3600, 1000, 100, 10, views_per_second=3.5)


def test_the_program_prints_it_without_a_store_a_teacher_or_data(capsys):
    cli.main([
        'store', 'estimate', '--num-samples', '1281167', '--teacher-num-classes', '1000', '--epochs', '300',
        '--views-per-second', '1000', '--processes', '8'])
    assert '6.9 GB' in (printed := capsys.readouterr().out) and '13.3 hours' in printed


def test_the_program_counts_the_samples_of_a_data_set(capsys):
    cli.main(['store', 'estimate', '--dataset', DATA, '--teacher-num-classes', '10', '--epochs', '2:5'])
    assert '1,000 samples x 3 epochs' in capsys.readouterr().out


def test_what_the_program_needs_to_know_is_one_sentence(capsys, one_sentence):
    flags = ['--num-samples', '10', '--epochs', '2']
    one_sentence(refusal(cli.main, ['store', 'estimate', *flags], capsys), '--teacher-num-classes')


@pytest.mark.parametrize('arguments, words', [((2000,), ['2000', '--topk']), ((10, 'best'), ["'best'", '--codec'])])
def test_settings_that_do_not_go_together_are_one_sentence(arguments, words, refused):
    with refused(*words):
        estimate_store(1000, 1000, 1, *arguments)
